# SPDX-License-Identifier: Apache-2.0
"""Embedders, fusion and heads: features in, features out."""
