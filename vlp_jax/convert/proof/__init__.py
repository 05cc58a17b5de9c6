# SPDX-License-Identifier: Apache-2.0
"""Proof that a conversion made the same model: references in PyTorch, run by the names in the file, to compare with."""
