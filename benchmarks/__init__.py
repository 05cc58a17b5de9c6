# SPDX-License-Identifier: Apache-2.0
"""Paired measurements: ours and a peer's code doing the same work by turns, in one process where both can live in one."""
