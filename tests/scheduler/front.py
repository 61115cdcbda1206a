"""A server's process without HTTP: connects, streams, does nothing for a while, and tells how its requests end."""

import sys
import time

import ray
from served import double, family
from tiny_engines import make, text

from lorakit import AdapterBank
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.ray_cluster import RayLinks, RaySettings

if __name__ == "__main__":
    address, folder, away = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="warning")
    base = double()
    catalog = Catalog(AdapterBank.open(folder), family()[0])
    links = RayLinks(make, catalog.folders, RaySettings(gpus=0, cpus=1.0, lease=2.0))
    cluster = Cluster(
        links, catalog, base.config, Policy(least=1, most=1), generation_config=base.generation_config, decode=text
    )
    cluster.start()
    handles = [cluster.submit([11, 12, 13], "lora", max_new_tokens=50, ignore_eos=True) for _ in range(200)]
    next(iter(handles[0]))
    print("streaming", flush=True)
    cluster._dispatcher._loop.call(time.sleep, float(away))
    handles[-1].wait(60)
    print(type(handles[-1].error).__name__, flush=True)
    cluster.close()
    print("closed", flush=True)
