"""A merge on a Ray cluster: workers write the shards, this process commits the model.

pip install "lorafast[ray]"
python examples/ray_merge.py BASE ADAPTER [ADAPTER …] --output DIR [--address ADDRESS]

On a cluster the base, the adapters and the output lie on a file system that all nodes share, and
all nodes have the same lorafast (in their image, or through `runtime_env`). Without --address a
cluster of this machine alone is started. A node that is lost on the way costs the shards that it
was writing; where the cluster itself is lost, the same call again does what is left.
"""

import argparse

import lorafast
import ray


def main() -> None:
    """Connect, merge, prove the result, and tell what was done."""
    parser = argparse.ArgumentParser(description="Merge LoRA adapters on a Ray cluster.")
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--output", required=True)
    parser.add_argument("--address", help="of the cluster, as ray://… or host:port")
    parser.add_argument("--threads", type=int, help="of each task; Ray gives it so many CPUs")
    arguments = parser.parse_args()

    # What is connected already is what executor="ray" uses, with its runtime environment.
    # ray.init(address="auto", runtime_env={"pip": ["lorafast==…"]}) installs lorafast on the nodes.
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    print(f"{len(ray.nodes())} nodes, {cpus} CPUs")

    plan = lorafast.plan(arguments.base, arguments.adapters)
    print(f"{plan.bytes_to_write / 1e9:.2f} GB in {len(plan.parts())} tasks")
    report = plan.execute(
        arguments.output, executor="ray", threads=arguments.threads, verify=True, progress=True
    )
    speed = report.bytes_written / report.merge_time / 1e9
    print(f"{report.output_path}: {report.merge_time:.1f} s, {speed:.2f} GB/s, verified")
    ray.shutdown()


if __name__ == "__main__":
    main()
