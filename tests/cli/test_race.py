"""batchnorm race, as a user runs it: results, bad input, and being stopped in every way."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from racing import toy

import batchnorm as bn
from batchnorm import cli
from batchnorm.cli.race import race

TESTS = Path(__file__).parent.parent
NAMES = "baseline,bn-x5,fast"
COMMAND = [sys.executable, "-m", "batchnorm", "race"]
PATH = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}


def start(*options: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *options],
        env=ENVIRONMENT,
        cwd=TESTS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background jobs ignore Ctrl-C, and their children with them
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out, err


def run_here(*options: str, code: int = 0) -> tuple[str, str]:
    """The same in this process, which has imported all that it takes; it starts one training process."""
    done = invoke(race, TESTS, "--workers", "1", *options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def numbers(directory: Path) -> list[list[str]]:
    """Step, epochs, loss and score of every evaluation: what must not depend on having been stopped."""
    rows = csv.DictReader((directory / "curves.csv").open())
    return sorted([row[key] for key in ("contender", "seed", "step", "epochs", "loss", "score")] for row in rows)


def alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def newest(directory: Path) -> float:
    """When the last checkpoint was written."""
    return max((file.stat().st_mtime for file in directory.glob("baseline*.pt")), default=0.0)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A race that was never stopped."""
    directory = tmp_path_factory.mktemp("race") / "whole"
    finish(start("--task", "racing.toy:task", "--seeds", "2", "--contenders", NAMES, "--out", str(directory)))
    return directory


def test_results_hold_what_the_docs_say(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert 0.5 < results["target"] <= 1
    assert results["command"].startswith("batchnorm race --task racing.toy:task")
    assert results["environment"]["torch"]
    assert [row["name"] for row in results["contenders"]] == ["baseline", "bn-x5", "fast"]
    for row in results["contenders"]:
        for key in ("learning_rate", "steps_to_target", "seconds_to_target", "steps_fraction", "seconds_fraction",
                    "steps_fraction_interval", "probability_reached", "end", "status"):  # fmt: skip
            assert key in row
        assert [run["seed"] for run in row["runs"]] == [0, 1]
    baseline = results["contenders"][0]
    assert baseline["steps_fraction"] == 1
    ends = [run["end"] for run in baseline["runs"]]
    assert results["target"] == pytest.approx(min(ends), abs=1e-6)  # of two, the mean less the standard error
    assert results["steps_to_each"]["steps"].keys() == {"baseline", "bn-x5", "fast"}


def test_curves_and_plots_are_written(whole: Path) -> None:
    runs = [json.loads(file.read_text()) for file in (whole / "runs").glob("*.json")]
    assert len(runs) == 6  # from two seeds
    assert len(numbers(whole)) == sum(len(run["curve"]) for run in runs)
    for name in ("score-steps.png", "score-seconds.png", "steps-to-each.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert "| fast |" in (whole / "results.md").read_text()


def test_same_race_again_gives_the_same_accuracies(whole: Path, tmp_path: Path) -> None:
    out, _ = run_here("--task", "racing.toy:task", "--seeds", "2", "--contenders", NAMES, "--out", str(tmp_path / "o"))
    assert numbers(tmp_path / "o") == numbers(whole)
    assert "target" in out
    assert "\x1b[" not in out  # readable when piped


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_race_resumes_to_the_same_numbers(tmp_path: Path, times: int) -> None:
    """SIGKILL to the whole group in the middle."""
    bn.race(toy.slow(), ["baseline", "fast"], seeds=1, out=tmp_path / "whole")
    directory, workers = tmp_path / "killed", ("--workers", str(times))
    options = ("--task", "racing.toy:slow", "--contenders", "baseline,fast", "--seeds", "1")
    process = start(*options, *workers, "--out", str(directory))
    for _ in range(times):
        since = time.time()
        wait_for(lambda: newest(directory / "runs") > since, process)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (directory / "results.json").exists()
        process = start(*workers, "--resume", str(directory))
    finish(process)
    assert numbers(directory) == numbers(tmp_path / "whole")
    results = [json.loads((d / "results.json").read_text()) for d in (directory, tmp_path / "whole")]
    for a, b in zip(*(r["contenders"] for r in results), strict=True):
        assert (a["steps_to_target"], a["end"]) == (b["steps_to_target"], b["end"])


def test_workers_end_when_the_parent_alone_is_killed(tmp_path: Path) -> None:
    """No orphan goes on writing into a race that somebody resumes."""
    process = start("--task", "racing.toy:slow", "--out", str(tmp_path / "o"))
    wait_for(lambda: list((tmp_path / "o" / "runs").glob("*.pt")), process)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while alive(process.pid):
        assert time.monotonic() < until, "a training process outlived its parent"
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["ctrl-c", "a scheduler"])
def test_a_stopped_race_says_how_to_resume(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "stopped"
    process = start("--task", "racing.toy:slow", "--workers", "1", "--out", str(directory))
    wait_for(lambda: list((directory / "runs").glob("*.pt")), process)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    _, err = finish(process, 130)
    assert err.strip().endswith(f"batchnorm race --resume {directory}")
    assert "Traceback" not in err


def test_diverging_contender_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    out, _ = run_here(
        "--task", "racing.toy:explodes", "--seeds", "1", "--contenders", "baseline,bn-x5", "--out", str(tmp_path / "o")
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "o" / "results.json").read_text())["contenders"]}
    assert rows["bn-x5"]["status"].startswith("diverged at step ")
    assert rows["bn-x5"]["steps_to_target"] is None
    assert rows["baseline"]["status"] == "reached the target"
    assert "diverged at step" in out


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "batchnorm", "race"]


def test_torchrun_trains_data_parallel_to_the_same_losses_and_rank_0_alone_writes(tmp_path: Path) -> None:
    """Without BN and dropout the gradient of two half batches is that of the whole: curves agree to rounding."""
    options = ("--task", "racing.toy:no_dropout", "--contenders", "baseline", "--seeds", "1")
    out, _ = finish(start(*options, "--out", str(tmp_path / "two"), command=TORCHRUN))
    assert out.count("Written:") == 1
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    bn.race(toy.no_dropout(), ["baseline"], seeds=1, out=tmp_path / "one")
    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one[:3] == two[:3]
        assert float(one[4] or "nan") == pytest.approx(float(two[4] or "nan"), rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_torchrun_with_bn_resumes_and_refuses_another_number_of_processes(tmp_path: Path) -> None:
    options = ("--task", "racing.toy:task", "--seeds", "1", "--out", str(tmp_path / "o"))
    finish(start(*options, command=TORCHRUN))
    whole = numbers(tmp_path / "o")
    for file in (tmp_path / "o" / "runs").glob("bn-x5*"):
        file.unlink()
    finish(start("--resume", str(tmp_path / "o"), command=TORCHRUN))
    assert numbers(tmp_path / "o") == whole
    _, err = finish(start("--resume", str(tmp_path / "o")), 2)
    assert "started with processes = 2, and this is 1" in err


def test_killed_or_failing_training_process_ends_the_race_with_its_reason(tmp_path: Path) -> None:
    _, err = run_here("--task", "racing.toy:dies", "--out", str(tmp_path / "dies"), code=1)
    assert "race: a training process ended with exit code -9" in err
    assert f"Go on with: batchnorm race --resume {tmp_path / 'dies'}" in err
    _, err = run_here("--task", "racing.toy:fails", "--out", str(tmp_path / "fails"), code=1)
    assert "ArithmeticError: a mistake of the user's" in err


def test_loaders_with_workers_and_contenders_that_are_lambdas_race_in_processes(tmp_path: Path) -> None:
    """Processes of a race may have no children, and functions cannot be sent to them."""
    options = ("--contenders", "baseline,bn-x5,racing.toy:later", "--seeds", "1", "--out", str(tmp_path / "o"))
    run_here("--task", "racing.toy:loaders", *options)
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["contenders"]
    assert [row["name"] for row in rows] == ["baseline", "bn-x5", "not/after: the first"]
    assert (tmp_path / "o" / "runs" / "not%2Fafter%3A the first-lr0.01-seed0.json").exists()


def test_other_batches_reach_the_training_processes(tmp_path: Path) -> None:
    options = ("--contenders", "baseline", "--seeds", "1", "--batch-size", "10")
    run_here("--task", "racing.toy:task", *options, "--out", str(tmp_path / "o"))
    steps, epochs = zip(*(row[2:4] for row in numbers(tmp_path / "o")), strict=True)
    assert max(map(int, steps)) == 400  # for 200 of 20 examples
    assert max(map(float, epochs)) == 4
    assert json.loads((tmp_path / "o" / "results.json").read_text())["contenders"][0]["learning_rate"] == 0.005


@pytest.mark.slow
def test_tuning_writes_rates_that_a_race_reads(tmp_path: Path) -> None:
    options = ("--task", "racing.toy:task", "--contenders", "baseline,fast", "--steps", "60")
    out, _ = finish(start(*options, "--tune", "--out", str(tmp_path / "tune")))
    scores = json.loads((tmp_path / "tune" / "tuning.json").read_text())["toy"]["default"]["scores"]
    for rates in scores.values():  # five, and further ones while the best is at the edge
        best = [*rates.values()].index(max(rates.values()))
        assert len(rates) == 9 or (len(rates) >= 5 and 0 < best < len(rates) - 1)
    assert ("so on to" in out) == any(len(rates) > 5 for rates in scores.values())
    assert "chosen" in out
    finish(start(*options, "--rates", str(tmp_path / "tune" / "tuning.json"), "--out", str(tmp_path / "race")))
    for row in json.loads((tmp_path / "race" / "results.json").read_text())["contenders"]:
        rates = scores[row["name"]]
        assert rates[f"{row['learning_rate']:g}"] == max(rates.values())


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """Run in this process; one line on stderr and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["batchnorm", "race", *options])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "resnet"], "race: unknown task 'resnet'. Known: inception, mlp, covertype"),
        (["--task", "racing.toy:returns_a_model"], "must return a batchnorm.Task (got Sequential)"),
        (["--task", "racing.toy:wrong_shapes"], "does not run as contender 'baseline': RuntimeError: mat1 and mat2"),
        (
            ["--task", "racing.toy:task", "--contenders", "baseline,bn-x50"],
            "unknown contender 'bn-x50'. Known: baseline",
        ),
        (["--task", "racing.toy:task", "--seeds", "0"], "--seeds must be a whole number of at least 1 (got 0)"),
        (["--task", "racing.toy:task", "--steps", "-3"], "--steps must be a whole number of at least 1 (got -3)"),
        (["--task", "racing.toy:task", "--workers", "0"], "--workers must be at least 1 (got 0)"),
        (["--task", "racing.toy:task", "--out", "/proc/none/race"], "--out /proc/none/race cannot be written"),
        (["--task", "racing.toy:task", "--quick", "--full"], "--quick and --full exclude each other"),
        (["--task", "racing.toy:raises"], "racing.toy:raises: the function raised KeyError: 'data'"),
        (["--resume", "/nowhere"], "/nowhere holds no race"),
        (["--data", "/nowhere"], "no train-images-idx3-ubyte.gz in /nowhere"),
        (["--task", "racing.toy:task", "--data", "/nowhere"], "--data is for the built-in tasks"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refused(capsys, monkeypatch, *options)
    assert message in err
    assert err.startswith("race: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/runs/*"))  # refused before any long work


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seeds", "5"], "seeds was 2, is 5"),
        (["--task", "mlp"], "task was racing.toy:task, is mlp"),
        (["--full"], "mode was default, is full"),
        (["--batch-size", "10"], "batch_size was 20, is 10"),
        (["--contenders", "baseline"], "contenders was ['baseline', 'bn-x5', 'fast'], is ['baseline']"),
    ],
)
def test_resume_of_another_configuration_is_refused(
    option: list[str], message: str, whole: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = refused(capsys, monkeypatch, "--resume", str(whole), *option)
    assert "holds a race of another configuration" in err
    assert message in err


def test_resume_of_a_finished_race_reports_the_same_again(whole: Path) -> None:
    before = json.loads((whole / "results.json").read_text())
    run_here("--resume", str(whole))
    after = json.loads((whole / "results.json").read_text())
    assert after["contenders"] == before["contenders"]


def test_a_baseline_that_sets_no_target_is_said_before_the_others_have_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = replace(toy.task(), learning_rate=1e-12, steps=20)
    bn.race(task, ["baseline", "short"], seeds=1, out=tmp_path / "o")
    said, rest = capsys.readouterr().out.split("NOTE: baseline: accuracy is 27.40% at every evaluation", 1)
    assert "short (seed 0" not in said
    assert "Timing steps" in rest


def test_a_race_that_goes_on_with_other_code_says_so(tmp_path: Path) -> None:
    """A run of the old code is there already; of a race that had ended nothing is said."""
    code = tmp_path / "of_somebody.py"
    code.write_text(f"import sys\nsys.path.append({str(TESTS)!r})\nfrom racing.toy import task\n")
    names, note = ["baseline", "short"], "NOTE: the code of toy was changed while it raced"
    options = ("--task", "of_somebody:task", "--seeds", "1", "--workers", "1", "--contenders")
    for done in (True, False):
        directory = tmp_path / f"done {done}"
        code.write_text(code.read_text().replace("# changed\n", ""))
        assert invoke(race, tmp_path, *options, ",".join(names), "--out", str(directory)).returncode == 0
        code.write_text(code.read_text() + "# changed\n")
        if not done:
            next((directory / "runs").glob("short*.json")).unlink()
        again = invoke(race, tmp_path, "--resume", str(directory), "--workers", "1")
        assert again.returncode == 0, again.stderr
        assert (note in again.stdout) is not done
        assert (note in (directory / "results.md").read_text()) is not done
