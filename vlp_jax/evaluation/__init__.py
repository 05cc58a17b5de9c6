# SPDX-License-Identifier: Apache-2.0
"""One file a task, and the report that shows what they found."""
