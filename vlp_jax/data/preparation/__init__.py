# SPDX-License-Identifier: Apache-2.0
"""From what people and sites give to checked records on disk: tables, pictures, shards, the manifest."""
