# SPDX-License-Identifier: Apache-2.0
"""What a run on a pod will need, from the TPU compiler itself, on any machine: memory, collectives, time, FLOPs."""
