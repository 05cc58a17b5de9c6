# SPDX-License-Identifier: Apache-2.0
"""Paired measurements: ours and a peer's code doing the same work in one process, by turns."""
