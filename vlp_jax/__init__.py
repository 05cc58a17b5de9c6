# SPDX-License-Identifier: Apache-2.0
"""Vision-language pretraining in JAX and Flax: one loop for every system, from raw files to a report."""
