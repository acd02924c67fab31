#!/usr/bin/env python3
"""Every RPC method of a running ringmilld, and every documented error, over its socket.

Plain Python, independent of the daemon's own code: what this script expects is what clients of polled storage know.
Usage: rpc_daemon.py RPC_SOCKET DIRECTORY CTRLR BDEV. CTRLR serves BDEV (malloc, 512-byte blocks) and a client keeps a
light load of reads and writes on it; the daemon runs on core 0 only; DIRECTORY is for images.
"""
import base64, json, os, socket, struct, sys, time

PARSE, REQUEST, METHOD, PARAMS = -32700, -32600, -32601, -32602
ENODEV, EEXIST, ENOENT = -19, -17, -2
RPC, DIRECTORY, CTRLR, BDEV = sys.argv[1:5]
called = set()
checks = 0


def check(condition, what):
    global checks
    checks += 1
    if not condition:
        sys.exit(f"FAILED: {what}")


class Connection:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(RPC)
        self.text = ""
        self.decoder = json.JSONDecoder()

    def send(self, value):
        self.socket.sendall((value if isinstance(value, str) else json.dumps(value)).encode())

    def receive(self):
        """The next value; None when the daemon has closed the connection."""
        while True:
            stripped = self.text.lstrip()
            if stripped:
                try:
                    value, end = self.decoder.raw_decode(stripped)
                    self.text = stripped[end:]
                    return value
                except json.JSONDecodeError:
                    pass
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self.text += data.decode()

    def ask(self, value):
        self.send(value)
        return self.receive()


conn = Connection()
next_id = 0


def raw(method, params=None):
    global next_id
    next_id += 1
    called.add(method)
    request = {"jsonrpc": "2.0", "id": next_id, "method": method}
    if params is not None:
        request["params"] = params
    answer = conn.ask(request)
    check(answer.get("jsonrpc") == "2.0" and answer.get("id") == next_id, f"{request} -> {answer}")
    check(("result" in answer) != ("error" in answer), f"result or error: {answer}")
    return answer


def call(method, **params):
    answer = raw(method, params or None)
    check("result" in answer, f"{method} {params} -> {answer.get('error')}")
    return answer["result"]


def fails(code, words, method, **params):
    answer = raw(method, params)
    error = answer.get("error") or {}
    check(error.get("code") == code, f"{method} {params}: expected {code}, got {answer}")
    for word in [words] if isinstance(words, str) else words:
        check(word in error.get("message", ""), f"{method} {params}: {word!r} is missing in {error}")
    check("\n" not in error["message"], f"one line: {error}")


def has(value, keys, what):
    for key in keys.split():
        check(key in value, f"{what}: {key} is missing in {value}")


def wire():
    """JSON-RPC itself: ids, notifications, batches, pipelining, what is no request."""
    for request_id in ["a string", 7, None, 1 << 40, ""]:
        answer = conn.ask({"id": request_id, "method": "framework_wait_init"})
        check(answer == {"jsonrpc": "2.0", "id": request_id, "result": True}, f"id {request_id!r}: {answer}")
    conn.send({"jsonrpc": "2.0", "method": "framework_wait_init"})
    conn.send({"jsonrpc": "2.0", "method": "no_such_method"})
    answer = conn.ask({"jsonrpc": "2.0", "id": "after", "method": "log_get_level", "params": None})
    check(answer["id"] == "after", f"a notification was answered: {answer}")
    many = [{"id": n, "method": "spdk_get_version"} for n in range(100)]
    conn.send("".join(json.dumps(request) for request in many))
    got = sorted(conn.receive()["id"] for _ in many)
    check(got == list(range(100)), f"pipelined: {got}")
    batch = conn.ask([
        {"id": 1, "method": "framework_wait_init"},
        {"method": "framework_wait_init"},
        {"id": 2, "method": "no_such_method"},
        7,
        {"id": 3, "method": "bdev_get_bdevs", "params": {"name": BDEV}},
    ])
    check(isinstance(batch, list) and len(batch) == 4, f"batch: {batch}")
    by_id = {entry["id"]: entry for entry in batch}
    check(by_id[1]["result"] is True and by_id[2]["error"]["code"] == METHOD, f"batch: {batch}")
    check(by_id[None]["error"]["code"] == REQUEST and by_id[3]["result"][0]["name"] == BDEV, f"batch: {batch}")
    conn.send([{"method": "framework_wait_init"}, {"method": "framework_wait_init"}])
    check(conn.ask({"id": 5, "method": "framework_wait_init"})["id"] == 5, "a batch of notifications was answered")
    for bad in [{"id": 1}, {"id": 1, "method": 7}, {"id": {}, "method": "x"}, {"id": 1, "method": "log_get_level", "params": 7},
                {"jsonrpc": "1.0", "id": 1, "method": "log_get_level"}, "7\n", "\"text\"", []]:
        answer = conn.ask(bad)
        check(answer["error"]["code"] in (REQUEST, PARAMS), f"{bad}: {answer}")
    for text in ["nonsense", "{\"id\": 1,, }", "{\"id\": 1 \"method\": 2}", "[1, 2"]:
        other = Connection()
        other.send(text)
        other.socket.shutdown(socket.SHUT_WR)
        answer = other.receive()
        if text != "[1, 2":
            check(answer["error"]["code"] == PARSE and answer["id"] is None, f"{text}: {answer}")
            answer = other.receive()
        check(answer is None or answer["error"]["code"] == PARSE, f"{text}: not closed")
    slow = Connection()
    for byte in json.dumps({"id": "slow", "method": "spdk_get_version"}):
        slow.send(byte)
        check(call("framework_wait_init") is True, "a slow client blocks others")
    check(slow.receive()["id"] == "slow", "a slow client is answered")


def framework():
    version = call("spdk_get_version")
    has(version["fields"], "major minor patch suffix", "version")
    check(version["version"].startswith("ringmill"), f"{version}")
    methods = call("rpc_get_methods", current=False, include_aliases=False)
    check(len(set(methods)) == len(methods) > 30, f"{methods}")
    for method in ["framework_start_init", "bdev_wait_for_examine"]:
        check(call(method) is True, method)
    subsystems = call("framework_get_subsystems")
    for entry in subsystems:
        check(isinstance(entry["depends_on"], list), f"{entry}")
        for step in call("framework_get_config", name=entry["subsystem"]):
            has(step, "method params", "a step of the configuration")
    check({"bdev", "vhost_blk"} <= {entry["subsystem"] for entry in subsystems}, f"{subsystems}")
    fails(PARAMS, "bdev", "framework_get_config", name="no_such_subsystem")
    fails(PARAMS, "name", "framework_get_config")

    def reactor():
        shown = call("framework_get_reactors")
        has(shown, "tick_rate pid reactors", "reactors")
        check([entry["lcore"] for entry in shown["reactors"]] == [0], f"{shown}")
        has(shown["reactors"][0], "lcore tid busy idle in_interrupt irq sys usr lw_threads", "a reactor")
        has(shown["reactors"][0]["lw_threads"][0], "name id cpumask elapsed", "a thread")
        return shown["tick_rate"], shown["reactors"][0]

    before = reactor()[1]
    time.sleep(0.5)
    rate, after = reactor()
    busy, idle = after["busy"] - before["busy"], after["idle"] - before["idle"]
    check(busy > 0 and idle > 0, f"busy {busy}, idle {idle}: a light load is both")
    check(0.3 * rate < busy + idle < 30 * rate, f"{busy + idle} ticks in half a second of {rate}/s")
    stats = call("thread_get_stats")
    has(stats["threads"][0], "name id cpumask busy idle active_pollers_count timed_pollers_count paused_pollers_count", "stats")
    check(stats["threads"][0]["busy"] >= after["busy"], f"{stats} goes back behind {after}")
    pollers = call("thread_get_pollers")["threads"][0]
    has(pollers, "name id active_pollers timed_pollers paused_pollers", "pollers")
    has(pollers["active_pollers"][0], "name id state run_count busy_count", "a poller")
    check(any(CTRLR in poller["name"] for poller in pollers["active_pollers"]), f"{pollers}")
    has(call("framework_get_scheduler"), "scheduler_name scheduler_period", "scheduler")
    for level in ["ERROR", "WARNING", "INFO", "DEBUG", "NOTICE"]:
        check(call("log_set_level", level=level) is True and call("log_get_level") == level, level)
        check(call("log_set_print_level", level=level) is True and call("log_get_print_level") == level, level)
    fails(PARAMS, "NOTICE", "log_set_level", level="LOUD")
    check(call("reactor_set_idle", policy="poll") is True, "poll")
    check(call("framework_get_reactors")["idle_policy"] == "poll", "poll is shown")
    check(call("reactor_set_idle", policy="adaptive", spin_us=150) is True, "adaptive")
    fails(PARAMS, "adaptive", "reactor_set_idle", policy="lazy")
    check(call("spdk_kill_instance", sig_name="SIGHUP") is True, "SIGHUP")
    fails(PARAMS, "SIGTERM", "spdk_kill_instance", sig_name="SIGNOTHING")
    time.sleep(0.3)
    check(Connection().ask({"id": 1, "method": "framework_wait_init"})["result"] is True, "SIGHUP ended the daemon")


def shape_of_bdevs():
    found = call("bdev_get_bdevs")
    check([bdev["name"] for bdev in found].count(BDEV) == 1, f"{found}")
    for bdev in found:
        has(bdev, "name aliases product_name block_size num_blocks uuid assigned_rate_limits claimed zoned "
                  "supported_io_types driver_specific", "a bdev")
        has(bdev["assigned_rate_limits"], "rw_ios_per_sec rw_mbytes_per_sec r_mbytes_per_sec w_mbytes_per_sec", "limits")
        has(bdev["supported_io_types"], "read write unmap flush reset nvme_admin nvme_io nvme_io_md write_zeroes zcopy "
            "get_zone_info zone_management zone_append compare compare_and_write abort seek_hole seek_data copy nvme_iov_md",
            "I/O types")
    bdev = call("bdev_get_bdevs", name=BDEV)[0]
    check(bdev["claimed"] is True and bdev["block_size"] == 512, f"{bdev}")
    found = call("bdev_get_bdevs", name=bdev["uuid"])[0]
    # The disk is in use: how much memory it takes changes from one look to the next.
    del found["driver_specific"], bdev["driver_specific"]
    check(found == bdev, f"by UUID {found}, by name {bdev}")


def bdevs():
    shape_of_bdevs()
    fails(ENODEV, "nothere", "bdev_get_bdevs", name="nothere")
    start = time.time()
    fails(ENODEV, "nothere", "bdev_get_bdevs", name="nothere", timeout=300)
    check(0.25 < time.time() - start < 10, "timeout is waited for")
    waiting = Connection()
    waiting.send({"id": 1, "method": "bdev_get_bdevs", "params": {"name": "null0", "timeout": 20000}})
    time.sleep(0.1)
    uuid = "6f1f3e7c-1b0a-4f0e-9c51-2a7d7c4b9e10"
    check(call("bdev_null_create", name="null0", num_blocks=4096, block_size=4096, uuid=uuid, md_interleave=False,
               dif_is_head_of_md=False) == "null0", "null")
    check(waiting.receive()["result"][0]["uuid"] == uuid, "who waited for the bdev got it")
    check(call("bdev_null_resize", name="null0", new_size=32) is True, "resize")
    check(call("bdev_get_bdevs", name="null0")[0]["num_blocks"] == 32 << 8, "resized")
    check(call("bdev_malloc_create", num_blocks=2048, block_size=512, enable_numa=False) == "Malloc0", "a name is made up")
    image, other = os.path.join(DIRECTORY, "rpc.img"), os.path.join(DIRECTORY, "aio.img")
    for path in [image, other]:
        with open(path, "wb") as file:
            file.truncate(1 << 20)
    check(call("bdev_uring_create", name="file0", filename=image) == "file0", "uring")
    shown = call("bdev_get_bdevs", name="file0")[0]
    check(shown["num_blocks"] * shown["block_size"] == 1 << 20, f"{shown}")
    check(image in json.dumps(shown["driver_specific"]), f"{shown}")
    os.truncate(image, 2 << 20)
    check(call("bdev_uring_rescan", name="file0") is True, "rescan")
    shown = call("bdev_get_bdevs", name="file0")[0]
    check(shown["num_blocks"] * shown["block_size"] == 2 << 20, f"{shown}")
    check(call("bdev_aio_create", name="aio0", filename=other, block_size=512, readonly=False, fallocate=False,
               nowait=False) == "aio0", "aio")
    check(call("bdev_aio_rescan", name="aio0") is True, "aio rescan")

    # Errors
    create = {"name": "x", "num_blocks": 8, "block_size": 512}
    fails(EEXIST, "null0", "bdev_null_create", name="null0", num_blocks=8, block_size=512)
    fails(EEXIST, BDEV, "bdev_malloc_create", name=BDEV, num_blocks=8, block_size=512)
    fails(EEXIST, "file0", "bdev_uring_create", name="file0", filename=image)
    fails(PARAMS, "blocks", "bdev_malloc_create", **create, blocks=8)
    fails(PARAMS, "num_blocks", "bdev_malloc_create", name="x", block_size=512)
    for bad in ["many", -1, 0, 1 << 60]:
        fails(PARAMS, "num_blocks", "bdev_malloc_create", name="x", block_size=512, num_blocks=bad)
    fails(PARAMS, "block_size", "bdev_malloc_create", name="x", block_size=513, num_blocks=8)
    fails(PARAMS, "uuid", "bdev_malloc_create", **create, uuid="no uuid")
    fails(PARAMS, "md_interleave", "bdev_malloc_create", **create, md_interleave=True)
    fails(PARAMS, "nowait", "bdev_aio_create", name="x", filename=image, nowait=True)
    fails(ENOENT, "none.img", "bdev_uring_create", name="x", filename=os.path.join(DIRECTORY, "none.img"))
    fails(PARAMS, "filename", "bdev_uring_create", name="x")
    fails(PARAMS, "cache", "bdev_uring_create", name="x", filename=image, cache="lots")
    for method in ["bdev_null_delete", "bdev_malloc_delete", "bdev_uring_delete", "bdev_aio_delete", "bdev_uring_rescan",
                   "bdev_aio_rescan", "bdev_get_histogram"]:
        fails(ENODEV, "nothere", method, name="nothere")
        fails(PARAMS, "name", method)
    fails(ENODEV, "nothere", "bdev_null_resize", name="nothere", new_size=1)
    fails(ENODEV, "null0", "bdev_malloc_delete", name="null0")
    fails(METHOD, "Method not found", "bdev_no_such_method")
    called.discard("bdev_no_such_method")


def vhost():
    for mask in ["0x1", "[0]"]:
        check(call("vhost_create_blk_controller", ctrlr="vm0", dev_name="null0", cpumask=mask, readonly=False,
                   packed_ring=False) is True, "controller")
        shown = call("vhost_get_controllers", name="vm0")[0]
        has(shown, "ctrlr cpumask delay_base_us iops_threshold socket sessions backend_specific", "a controller")
        has(shown["backend_specific"]["block"], "readonly bdev transport", "a controller's disk")
        check(shown["cpumask"] == "0x1" and os.path.exists(shown["socket"]), f"{shown}")
        check(call("bdev_get_bdevs", name="null0")[0]["claimed"] is True, "claimed")
        fails(PARAMS, "null0", "vhost_create_blk_controller", ctrlr="vm1", dev_name="null0")
        check(call("vhost_controller_set_coalescing", ctrlr="vm0", delay_base_us=50, iops_threshold=1000) is True, "coalescing")
        shown = call("vhost_get_controllers", name="vm0")[0]
        check((shown["delay_base_us"], shown["iops_threshold"]) == (50, 1000), f"{shown}")
        # The daemon has one core: a move to it changes nothing, also before a guest has come.
        check(call("vhost_controller_set_cpumask", ctrlr="vm0", cpumask=mask) is True, "cpumask")
        check(call("vhost_controller_set_cpumask", ctrlr="vm0", cpumask=mask, queue=1) is True, "cpumask of a queue")
        check(call("vhost_get_controllers", name="vm0")[0]["cpumask"] == "0x1", "cpumask shown")
        fails(PARAMS, "core", "vhost_controller_set_cpumask", ctrlr="vm0", cpumask="0x2")
        fails(PARAMS, "cpumask", "vhost_controller_set_cpumask", ctrlr="vm0", cpumask="zz")
        fails(PARAMS, "queue", "vhost_controller_set_cpumask", ctrlr="vm0", cpumask=mask, queue=64)
        check(call("vhost_delete_controller", ctrlr="vm0") is True and not os.path.exists(shown["socket"]), "deleted")
        check(call("bdev_get_bdevs", name="null0")[0]["claimed"] is False, "free again")
    fails(PARAMS, "exists", "vhost_create_blk_controller", ctrlr=CTRLR, dev_name="null0")
    fails(PARAMS, BDEV, "vhost_create_blk_controller", ctrlr="vm1", dev_name=BDEV)
    fails(PARAMS, "nothere", "vhost_create_blk_controller", ctrlr="vm1", dev_name="nothere")
    fails(PARAMS, "core", "vhost_create_blk_controller", ctrlr="vm1", dev_name="null0", cpumask="0x2")
    fails(PARAMS, "cpumask", "vhost_create_blk_controller", ctrlr="vm1", dev_name="null0", cpumask="zz")
    fails(PARAMS, "cpus", "vhost_create_blk_controller", ctrlr="vm1", dev_name="null0", cpus="0x1")
    fails(PARAMS, "path", "vhost_create_blk_controller", ctrlr="../vm1", dev_name="null0")
    for method, more in [("vhost_delete_controller", {}), ("vhost_controller_set_coalescing",
                                                           {"delay_base_us": 1, "iops_threshold": 1}),
                         ("vhost_controller_set_cpumask", {"cpumask": "0x1"})]:
        fails(PARAMS, "nothere", method, ctrlr="nothere", **more)
    fails(PARAMS, "nothere", "vhost_get_controllers", name="nothere")
    session = call("vhost_get_controllers", name=CTRLR)[0]["sessions"][0]
    has(session, "vid id name started max_queues inflight_task_cnt", "a session")
    check(session["started"] is True and len(session["queues"]) > 0, f"{session}")


def figures():
    def stat():
        shown = call("bdev_get_iostat", names=[BDEV])
        has(shown, "tick_rate ticks bdevs", "iostat")
        entry = shown["bdevs"][0]
        has(entry, "name bytes_read num_read_ops bytes_written num_write_ops bytes_unmapped num_unmap_ops "
            "read_latency_ticks max_read_latency_ticks min_read_latency_ticks write_latency_ticks unmap_latency_ticks "
            "num_flush_ops num_write_zeroes_ops", "iostat of a bdev")
        return shown["ticks"], entry

    ticks, before = stat()
    time.sleep(0.5)
    later, after = stat()
    check(later > ticks, "ticks")
    for key in ["bytes_read", "num_read_ops", "bytes_written", "num_write_ops", "read_latency_ticks", "write_latency_ticks"]:
        check(after[key] > before[key], f"{key}: {before[key]} then {after[key]}")
    check(after["bytes_read"] >= 512 * after["num_read_ops"], f"{after}")
    check(after["min_read_latency_ticks"] <= after["read_latency_ticks"] / after["num_read_ops"]
          <= after["max_read_latency_ticks"], f"{after}")
    channels = call("bdev_get_iostat", names=[BDEV], per_channel=True)
    total = sum(channel["num_read_ops"] for channel in channels["channels"])
    check(after["num_read_ops"] <= total <= stat()[1]["num_read_ops"], f"{total} reads over all channels, {after}")
    check(BDEV in [bdev["name"] for bdev in call("bdev_get_iostat")["bdevs"]], "iostat of all")
    check(call("bdev_reset_iostat", name=BDEV) is True, "reset")
    check(stat()[1]["num_read_ops"] < after["num_read_ops"], "reset starts afresh")
    fails(ENODEV, "nothere", "bdev_get_iostat", names=["nothere"])
    fails(ENODEV, "nothere", "bdev_reset_iostat", name="nothere")
    fails(PARAMS, "reset_mode", "bdev_get_iostat", reset_mode="some")

    answer = raw("bdev_get_histogram", {"name": BDEV})
    check(answer["error"]["code"] < 0 and "enable" in answer["error"]["message"], f"{answer}")
    def ops():
        return sum(count for key, count in stat()[1].items() if key.startswith("num_"))

    start = ops()
    check(call("bdev_enable_histogram", name=BDEV, enable=True) is True, "histogram")
    time.sleep(0.3)
    low, shown, high = ops() - start, call("bdev_get_histogram", name=BDEV), ops() - start
    data = base64.b64decode(shown["histogram"])
    counts = struct.unpack(f"<{len(data) // 8}Q", data)
    check(len(counts) == (64 - shown["granularity"] + 1) << shown["granularity"], f"{len(counts)} buckets")
    check(shown["tsc_rate"] > 0 and shown["granularity"] == 7, "granularity 7")
    # The client goes on meanwhile: up to its depth (2 queues of 4) may be counted in one and not yet in the other.
    check(10 < low - 8 <= sum(counts) <= high + 8, f"{sum(counts)} in the histogram, {low} to {high} requests")
    borders = call("bdev_get_histogram_borders", name=BDEV, borders=[10, 1000, 60_000_000])["borders_count"]
    check(len(borders) == 4 and borders == sorted(borders) and borders[2] == borders[3] >= sum(counts), f"{borders}")
    fails(PARAMS, "borders", "bdev_get_histogram_borders", name=BDEV, borders=[5, 1])
    fails(PARAMS, "borders", "bdev_get_histogram_borders", name=BDEV)
    check(call("bdev_enable_histogram", name=BDEV, enable=True, opc="flush") is True, "histogram of one operation")
    check(call("bdev_enable_histogram", name=BDEV, enable=False) is True, "off")
    fails(ENODEV, "nothere", "bdev_enable_histogram", name="nothere", enable=True)
    fails(PARAMS, "opc", "bdev_enable_histogram", name=BDEV, enable=True, opc="dance")

    rows = call("latency_get_histograms", ctrlr=CTRLR)["histograms"]
    stages = {row["stage"] for row in rows}
    check(stages == {"queue", "device", "complete", "total"}, f"{stages}")
    for row in rows:
        has(row, "ctrlr bdev queue op stage count min mean p50 p90 p99 p99_9 p99_99 max", "latencies")
        check(row["min"] <= row["p50"] <= row["p90"] <= row["p99"] <= row["p99_9"] <= row["p99_99"] <= row["max"], f"{row}")
        check(base64.b64decode(row["hdr"])[:3] == b"\x1c\x84\x93", "HdrHistogram's V2 compressed cookie")
    check(call("latency_get_histograms", bdev=BDEV)["histograms"], "by bdev")
    count = max(row["count"] for row in rows)
    check(call("latency_reset_histograms", ctrlr=CTRLR) is True, "reset")
    rows = call("latency_get_histograms")["histograms"]
    check(max([row["count"] for row in rows if row["ctrlr"] == CTRLR] or [0]) < count, "latencies start afresh")
    for method in ["latency_get_histograms", "latency_reset_histograms"]:
        fails(PARAMS, "nothere", method, ctrlr="nothere")
        fails(ENODEV, "nothere", method, bdev="nothere")

    def reads():
        return call("bdev_get_iostat", name=BDEV)["bdevs"][0]["num_read_ops"]

    check(call("latency_set_recording", ctrlr=CTRLR, enable=False) is True, "no recording")
    time.sleep(0.05)
    before = reads()
    time.sleep(0.2)
    check(reads() == before, "counters stand still under load")
    check(call("latency_set_recording", enable=True) is True, "recording again")
    time.sleep(0.2)
    check(reads() > before, "counters go on")
    fails(PARAMS, "enable", "latency_set_recording")
    fails(PARAMS, "nothere", "latency_set_recording", ctrlr="nothere", enable=True)
    fails(ENODEV, "nothere", "latency_set_recording", bdev="nothere", enable=True)


def round_trip():
    """What clients call save_config and load_config."""
    def save():
        return {entry["subsystem"]: call("framework_get_config", name=entry["subsystem"])
                for entry in call("framework_get_subsystems")}

    call("vhost_create_blk_controller", ctrlr="vm0", dev_name="file0", readonly=True)
    call("vhost_controller_set_coalescing", ctrlr="vm0", delay_base_us=7, iops_threshold=99)
    saved = save()
    mine = ["null0", "Malloc0", "file0", "aio0"]
    bdevs_before = [bdev for bdev in call("bdev_get_bdevs") if bdev["name"] in mine]
    controller = call("vhost_get_controllers", name="vm0")
    check(len(bdevs_before) == 4, f"{bdevs_before}")
    call("vhost_delete_controller", ctrlr="vm0")
    for kind, name in zip(["null", "malloc", "uring", "aio"], mine):
        check(call(f"bdev_{kind}_delete", name=name) is True, name)
        fails(ENODEV, name, "bdev_get_bdevs", name=name)
    for step in saved["bdev"] + saved["vhost_blk"]:
        if {step["params"].get("name"), step["params"].get("ctrlr")} & set(mine + ["vm0"]):
            answer = raw(step["method"], step["params"])
            check("result" in answer, f"{step} -> {answer}")
    check([bdev for bdev in call("bdev_get_bdevs") if bdev["name"] in mine] == bdevs_before, "the same bdevs")
    check(call("vhost_get_controllers", name="vm0") == controller, "the same controller")
    check({key: sorted(map(str, steps)) for key, steps in save().items()} ==
          {key: sorted(map(str, steps)) for key, steps in saved.items()}, "saves the same again")
    call("vhost_delete_controller", ctrlr="vm0")
    for kind, name in zip(["null", "malloc", "uring", "aio"], mine):
        call(f"bdev_{kind}_delete", name=name)


def nvme():
    """Controllers that are not there; tests with one in software are the daemon's own."""
    check(call("bdev_nvme_set_options", action_on_timeout="abort", timeout_us=5000000) is True, "options")
    fails(-32602, "action_on_timeout", "bdev_nvme_set_options", action_on_timeout="panic")
    check(call("bdev_nvme_get_controllers") == [], "no controllers")
    fails(ENODEV, "Nvme9", "bdev_nvme_get_controllers", name="Nvme9")
    fails(-32602, "RDMA", "bdev_nvme_attach_controller", name="Nvme0", trtype="RDMA", traddr="1.2.3.4")
    error = raw("bdev_nvme_attach_controller", {"name": "Nvme0", "trtype": "PCIe", "traddr": "ffff:fe:1f.7"})["error"]
    check(error["code"] < 0 and "ffff:fe:1f.7" in error["message"], f"{error}")
    for method in ["detach_controller", "reset_controller", "get_controller_health_info"]:
        fails(ENODEV, "Nvme9", f"bdev_nvme_{method}", name="Nvme9")


for part in [wire, framework, bdevs, vhost, figures, nvme, round_trip]:
    part()
missed = set(call("rpc_get_methods")) - called - {"framework_wait_init"}
check(not missed, f"methods never called: {sorted(missed)}")
print(f"{len(called)} methods, {checks} checks")
