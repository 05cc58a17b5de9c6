# SPDX-License-Identifier: Apache-2.0
"""Weights both ways: other people's files to our parameters and back, with proof."""
