"""How long GET /models takes, asked again and again over one connection by a process that does nothing else.

argv: URL, key, requests, seconds between two. Prints the milliseconds as a JSON list. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from urllib.parse import urlsplit

url, key, count, pause = sys.argv[1:]
connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
took = []
for _ in range(int(count)):
    began = time.perf_counter()
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    answer.read()
    took.append(1000 * (time.perf_counter() - began))
    if answer.status != 200:
        raise SystemExit(f"GET /v1/models: {answer.status}")
    time.sleep(float(pause))
print(json.dumps(took))
