# SPDX-License-Identifier: Apache-2.0
"""Meshes, sharding rules and the only place that sees partition boxes."""
