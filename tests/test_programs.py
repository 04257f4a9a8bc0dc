"""errors.py, in all programs: one-line errors, exit codes, output that is lost or cannot be displayed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import make_config

import datasets
import errors
import evaluate
import predict
import train
from errors import UserError

ROOT = Path(errors.__file__).parent
PROGRAM = "import tiny, runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_names_that_the_terminal_cannot_display(tmp_path, monkeypatch):
    """Chinese class names and a file name that is not UTF-8, on a console with code page 1252."""
    path, run, bad = make_config(tmp_path), f"--run={tmp_path / 'run'}", os.fsdecode(b"p\xe4.png")
    for folder in (tmp_path / "data/images/val", tmp_path / "data/labels/val"):
        (folder / "0.png").rename(folder / bad)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "cp1252", write_through=True))
    errors.protect_output()
    names, printed = "classes=[背景, 上衣, 裤子]", sys.stdout.buffer
    assert datasets.main(["--cfg", path, names, f"--out={tmp_path / 'sheets'}"]) == 0
    train.main(["--cfg", path, names])
    evaluate.main([run])
    assert predict.main([run, str(tmp_path / "data/images/val"), f"--out={tmp_path / 'parsed'}"]) == 0
    assert rb"\u4e0a\u8863" in printed.getvalue() and (tmp_path / "parsed/labels" / bad).exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("program, redirection, written", [
    ("evaluate.py --run {run} synthetic_val=3 --out {out}", "| head -1", "out/best_worst.png"),
    ("datasets.py --cfg {config} --out {out}", ">/dev/full", "out/train.png"),
    ("predict.py --run {run} {photo} --out {out}", ">&- 2>&-", "out/overlays/x.jpg")])
def test_a_lost_output_loses_no_work(small, tmp_path, program, redirection, written):
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    arguments = program.format(run=small, config=make_config(tmp_path), photo=tmp_path / "x.png", out=tmp_path / "out")
    command = f'set -o pipefail; {sys.executable} -c "{PROGRAM}" {ROOT}/{arguments} {redirection}'
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Error" not in done.stderr and (tmp_path / written).exists()


@pytest.mark.parametrize("error, code, words", [
    (UserError("x.png: damaged"), 1, "error: x.png: damaged\n"), (KeyboardInterrupt(), 130, "Ctrl-C"),
    (MemoryError(), 1, "out of memory: try fewer"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 1, "of GPU memory"),
    (RuntimeError("CUDA error: uncorrectable ECC error\nmore"), 1, "the GPU cannot be used"),
    (RuntimeError("CUDA-capable device(s) is/are busy or unavailable"), 1, "the GPU cannot be used"),
    (OSError(28, "No space left on device", "x.png"), 1, "x.png: No space left"), (KeyError("bug"), 1, "Traceback")])
def test_errors_are_one_line_and_bugs_keep_their_traceback(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        errors.run_program(main, "fewer")
    printed = capsys.readouterr().err
    assert end.value.code == code and words in printed and (printed.count("\n") == 1) == ("bug" not in printed)


@pytest.mark.parametrize("program, options", [
    (evaluate, "--checkpoint runs/x --tta --split train --batch 2 --device cpu --out y a=b"),
    (predict, "x --checkpoint runs/x --out y --map m --skip-existing --tta --size 64 --probs --batch 2 z")])
def test_torchrun_accepts_the_options_of_the_programs(program, options):
    """On Python 3.11, torchrun itself takes abbreviations: --run would be its --run-path."""
    from torch.distributed.run import parse_args
    assert parse_args(["--nproc_per_node", "4", "x.py", *options.split()]).training_script_args == options.split()
    args = program.arguments(options.split())
    assert (args.run, args.batch, args.tta, str(args.out)) == ("runs/x", 2, True, "y")
