# SPDX-License-Identifier: Apache-2.0
"""Numbers only: one file a system, each starts from configs/common.py."""
