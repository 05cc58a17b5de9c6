# SPDX-License-Identifier: Apache-2.0
"""What is in a prepared directory, and what of it would make a run suffer: for people, and as json."""
