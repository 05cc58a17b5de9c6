# SPDX-License-Identifier: Apache-2.0
"""Vision-language pretraining in JAX and Flax: ViLT, E2E-VLP, ALBEF and the systems around them."""
