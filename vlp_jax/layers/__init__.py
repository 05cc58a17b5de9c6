# SPDX-License-Identifier: Apache-2.0
"""Parts with no idea of modality: attention, blocks, stacks, positions, dropout."""
