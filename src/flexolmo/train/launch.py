"""Files that start a training on other machines: by torchrun alone, under Slurm, on Kubernetes.

All three run the same script, in which processes meet by torchrun's static rendezvous: its own way
(c10d) unpickles what anybody sends who reaches the port. Knows nothing of models or rates.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import tomli_w

from flexolmo.bundle.manifest import require_name
from flexolmo.errors import ConfigError
from flexolmo.files import write_bytes

PORT = 29500
FILES = ("recipe.toml", "torchrun.sh", "slurm.sh", "kubernetes.yaml")


@dataclass(frozen=True)
class Launch:
    """One training on `nodes` computers of `per_node` processes each."""

    recipe: dict[str, Any]  # as its TOML says it
    is_expert: bool
    nodes: int
    per_node: int
    device: str
    threads: int  # of each process
    hours: float  # that it is thought to take
    name: str = "expert"

    @property
    def cpus(self) -> int:
        """Processor cores that the processes of one computer use."""
        return self.threads * self.per_node


def write_launch(directory: Path, launch: Launch) -> list[Path]:
    """Write the recipe and what starts it: FILES, in `directory`.

    Raises ConfigError for a directory that `refuse_taken` refuses, or for a name that no expert can
    have: scripts hold it.
    """
    require_name(launch.name)
    directory = Path(directory)
    script = torchrun_script(launch)
    recipe = tomli_w.dumps(launch.recipe)
    texts = (recipe, script, slurm_script(launch), kubernetes_manifest(launch, script, recipe))
    refuse_taken(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        write_bytes(path, text.encode())
    return paths


def refuse_taken(directory: Path) -> None:
    """Raises ConfigError if `directory` is a file, or holds one of FILES."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, expected a directory. Choose another place.")
    if found := [name for name in FILES if (directory / name).exists()]:
        raise ConfigError(f"{directory} holds {', '.join(found)} already; choose another place.")


def torchrun_script(launch: Launch) -> str:
    """A script that starts the processes of one computer."""
    if launch.is_expert:
        paths = {"ANCHOR": "anchor", "DATA": f"prepared/{launch.name}", "NAME": launch.name}
        paths["OUT"] = f"{launch.name}.run"
        command = 'expert train --anchor "$ANCHOR" --data "$DATA" --name "$NAME" --out "$OUT"'
    else:
        paths = {"DATA": "prepared/public", "OUT": "anchor"}
        command = 'anchor train --data "$DATA" --out "$OUT"'
    defaults = "\n".join(f'{k}="${{{k}:-{v}}}"' for k, v in paths.items())
    if launch.nodes == 1:
        meet = 'MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"\nNODE_RANK=0'
    else:
        meet = (
            ': "${MASTER_ADDR:?Set it to the name of the first computer.}"\n'
            f': "${{NODE_RANK:?Set it to the number of this computer, 0 to {launch.nodes - 1}.}}"'
        )
    return f"""\
#!/usr/bin/env bash
# Computers: {launch.nodes}. Processes of each: {launch.per_node}. Run it on each computer.
# Run it again after a stop: it goes on from the last checkpoint.
# Paths, seen alike by all computers; set a variable of that name for another:
set -euo pipefail
HERE="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
{defaults}
# Where the processes meet. Nobody but them should reach this port.
{meet}
MASTER_PORT="${{MASTER_PORT:-{PORT}}}"
# Threads of each process, as planned; torchrun alone gives one.
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{launch.threads}}}"

exec torchrun --nnodes {launch.nodes} --node-rank "$NODE_RANK" --nproc-per-node {launch.per_node} \\
    --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \\
    -m flexolmo {command} \\
    --recipe "$HERE/recipe.toml" --device {shlex.quote(launch.device)}
"""


def slurm_script(launch: Launch) -> str:
    """A batch script that runs torchrun.sh once on each computer."""
    gpus = f"#SBATCH --gpus-per-node={launch.per_node}\n" if launch.device != "cpu" else ""
    minutes = int(60 * (1.2 * launch.hours + 1))  # a fifth more than was thought, and a start
    days, left = divmod(minutes, 24 * 60)
    limit = f"{days}-{left // 60:02}:{left % 60:02}:00"
    return f"""\
#!/usr/bin/env bash
# From this directory's parent or any other from which the paths in torchrun.sh hold:
#   sbatch --export=ALL,HERE=/this/directory /this/directory/slurm.sh
#SBATCH --job-name=flexolmo
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --cpus-per-task={launch.cpus}
#SBATCH --time={limit}
#SBATCH --requeue
# If your site allows less time, set it and submit again: the run goes on from its checkpoint.
set -euo pipefail
: "${{HERE:?Say where torchrun.sh is: sbatch --export=ALL,HERE=/this/directory slurm.sh}}"
export HERE
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
# srun does not take over the number of cores.
srun --kill-on-bad-exit=1 --cpus-per-task={launch.cpus} \\
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$HERE/torchrun.sh"'
"""


def kubernetes_manifest(launch: Launch, script: str, recipe: str) -> str:
    """A Job of one pod a computer, a Service by which pods find the first, and their files."""
    is_cpu = launch.device == "cpu"
    limit = f"cpu: {launch.cpus}" if is_cpu else f"nvidia.com/gpu: {launch.per_node}"
    return f"""\
# Set the image (with flexolmo and, for GPUs, CUDA) and the claim of the shared volume, then:
#   kubectl apply -f kubernetes.yaml
# The volume, seen by all pods, holds the paths that torchrun.sh names; output goes there too.
apiVersion: v1
kind: ConfigMap
metadata:
  name: flexolmo-train
data:
  recipe.toml: |
{indent(recipe, "    ")}
  torchrun.sh: |
{indent(script, "    ")}
---
# Gives the pods names: flexolmo-train-0.flexolmo-train is the first.
apiVersion: v1
kind: Service
metadata:
  name: flexolmo-train
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: flexolmo-train
  ports:
    - port: {PORT}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: flexolmo-train
spec:
  completionMode: Indexed
  completions: {launch.nodes}
  parallelism: {launch.nodes}
  backoffLimit: 20  # a stopped pod starts again, and the run goes on from its checkpoint
  template:
    spec:
      subdomain: flexolmo-train
      restartPolicy: OnFailure
      automountServiceAccountToken: false
      containers:
        - name: train
          image: REGISTRY/flexolmo:TAG
          workingDir: /work
          command: [bash, -c]
          args:
            - NODE_RANK="$JOB_COMPLETION_INDEX" exec bash /launch/torchrun.sh
          env:
            - name: MASTER_ADDR
              value: flexolmo-train-0.flexolmo-train
          resources:
            limits:
              {limit}
          volumeMounts:
            - name: launch
              mountPath: /launch
            - name: work
              mountPath: /work
            - name: memory
              mountPath: /dev/shm
      volumes:
        - name: launch
          configMap:
            name: flexolmo-train
        - name: work
          persistentVolumeClaim:
            claimName: CLAIM
        - name: memory  # processes of one pod share tensors here
          emptyDir:
            medium: Memory
"""
