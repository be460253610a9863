"""Files that start a training are ones that bash, Slurm and Kubernetes take."""

import math
import subprocess

import pytest
import yaml

from flexolmo.config import read_recipe
from flexolmo.errors import ConfigError
from flexolmo.train.expert import ExpertRecipe
from flexolmo.train.launch import Launch, torchrun_script, write_launch


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("is_expert", [True, False])
def test_launch_files_are_ones_that_their_readers_take(tmp_path, nodes, is_expert):
    launch = Launch({"train": {"steps": 30}}, is_expert, nodes, 8, "cuda", 4, 30.0, "maths")
    paths = {p.name: p for p in write_launch(tmp_path / "out", launch)}
    for name in ("torchrun.sh", "slurm.sh"):
        subprocess.run(["bash", "-n", paths[name]], check=True)
    assert "#SBATCH --time=1-13:00:00" in paths["slurm.sh"].read_text()
    config_map, service, job = yaml.safe_load_all(paths["kubernetes.yaml"].read_text())
    for name in ("recipe.toml", "torchrun.sh"):
        assert config_map["data"][name].rstrip() == paths[name].read_text().rstrip()
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == nodes
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    if is_expert:
        assert read_recipe(paths["recipe.toml"], ExpertRecipe).train.steps == 30
    with pytest.raises(ConfigError, match="already"):
        write_launch(tmp_path / "out", launch)


def test_processors_are_asked_for_as_many_cores_as_threads_are_planned(tmp_path):
    paths = write_launch(tmp_path, Launch({}, True, 2, 3, "cpu", 5, 1.0, "maths"))
    texts = {p.name: p.read_text() for p in paths}
    asked = [line.strip(" \\") for line in texts["slurm.sh"].splitlines() if "cpus" in line]
    assert [line.split()[-1] for line in asked] == ["--cpus-per-task=15"] * 2
    job = list(yaml.safe_load_all(texts["kubernetes.yaml"]))[-1]
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": 15}


@pytest.mark.parametrize(
    "name", ["$(id)", "`id`", 'a"; id; "', "a b", "a\nb", "../a", "", "A", "a\n"]
)
def test_a_name_that_no_expert_can_have_reaches_no_script(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name an expert"):
        write_launch(tmp_path / "out", Launch({}, True, 1, 1, "cpu", 1, 1.0, name))
    assert not (tmp_path / "out").exists()


def test_the_script_starts_torchrun_without_pickles(tmp_path):
    """A torchrun that prints what it was given stands in for the real one."""
    write_launch(tmp_path, Launch({}, True, 2, 4, "cpu", 3, 1.0, "maths"))
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "threads $OMP_NUM_THREADS"\n')
    stand_in.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NODE_RANK": "1", "ANCHOR": "my anchor"}
    told = ["bash", str(tmp_path / "torchrun.sh")]
    missing = subprocess.run(told, env=variables, capture_output=True, text=True)
    assert missing.returncode != 0 and "MASTER_ADDR" in missing.stderr
    done = subprocess.run(
        told, env=variables | {"MASTER_ADDR": "first"}, capture_output=True, text=True, check=True
    )
    given = done.stdout.splitlines()
    assert "--rdzv-backend static --master-addr first" in " ".join(given)
    assert given[given.index("--anchor") + 1] == "my anchor"
    assert given[given.index("--node-rank") + 1] == "1"
    assert given[-1] == "threads 3"
    assert given[given.index("--recipe") + 1] == str(tmp_path / "recipe.toml")
    assert "c10d" not in torchrun_script(Launch({}, False, 1, 1, "cpu", 1, math.pi))
