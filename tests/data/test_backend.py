# SPDX-License-Identifier: Apache-2.0
"""Tensorflow is loaded without a word of its libraries, but what else is said meanwhile is passed on."""

import subprocess
import sys

CODE = """
import os, sys
from vlp_jax import cli
from vlp_jax.data import backend

class Talking:
    def find_spec(self, name, *_):
        if name == "tensorflow":
            os.write(2, b"something else\\n")

sys.meta_path.insert(0, Talking())
backend.load_tensorflow()
backend.load_tensorflow()
import tensorflow as tf
print(int(tf.reduce_sum(tf.matmul(tf.ones([64, 64]), tf.ones([64, 64])))))
os.write(2, b"afterwards\\n")
"""


def test_only_what_others_say_is_heard():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert run.stdout == "262144\n"
    assert run.stderr == "something else\nafterwards\n"
