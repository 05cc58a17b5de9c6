# SPDX-License-Identifier: Apache-2.0
"""From raw files to host batches, in tf.data and numpy; knows nothing of models."""
