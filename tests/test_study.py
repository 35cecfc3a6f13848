"""study.py: the plan, budgets, the queue and its rows, the report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from test_train import write_data

import study

TINY = "--sizes 16,32 --main 16 --layers 8 --block-size 16 --batch-tokens 64 --eval-tokens 320 --rates 3e-3,6e-3,1.2e-2"
BUDGETS = "--budgets 1.3e8,2.6e8"  # 35 and 70 steps of the vanilla model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory to run in, with data; how a tiny study is called there."""
    write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return [*TINY.split(), *BUDGETS.split(), "--data", "data", "--rows", "rows.jsonl", "--extra=--no-compile --device cpu"]


def flags_of(place, *more):
    return study.read_flags(["plan", *place, *more])


if __name__ == "__main__":
    pass
