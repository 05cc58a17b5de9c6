# SPDX-License-Identifier: Apache-2.0
"""State, step, optimizer, checkpoint and the one loop."""
