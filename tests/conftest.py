"""One thread for every test and every process that a test starts: the models are tiny, and threads that wait for each other on a
busy machine cost more than they bring."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
