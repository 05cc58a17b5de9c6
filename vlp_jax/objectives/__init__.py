# SPDX-License-Identifier: Apache-2.0
"""Pure functions of arrays that return a Term: mlm, itm, transport, masked patches."""
