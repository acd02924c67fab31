//! Every method of the RPC and every documented error, with requests written as an independent client writes them.

mod support;

use std::collections::BTreeSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ringmill_tools::rpc::methods::METHODS;
use serde_json::{Value, json};
use support::{Client, FakeDaemon};

fn daemon_with_disk() -> (FakeDaemon, Client) {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    let params = r#"{"name":"Null0","num_blocks":2048,"block_size":512,"dif_is_head_of_md":false}"#;
    assert_eq!(client.call("bdev_null_create", params), "Null0");
    (daemon, client)
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn framework_methods_answer_as_documented() {
    let (_daemon, mut client) = daemon_with_disk();
    let version = client.call("spdk_get_version", "null");
    assert_eq!(keys(&version), BTreeSet::from(["fields", "version"]));
    assert_eq!(keys(&version["fields"]), BTreeSet::from(["major", "minor", "patch", "suffix"]));
    let methods = client.call("rpc_get_methods", r#"{"current":false,"include_aliases":false}"#);
    assert_eq!(methods.as_array().unwrap().len(), METHODS.len());
    assert_eq!(client.call("framework_wait_init", "{}"), true);
    assert_eq!(client.call("framework_start_init", "{}"), true);
    assert_eq!(client.call("bdev_wait_for_examine", "{}"), true);
    let subsystems = client.call("framework_get_subsystems", "{}");
    assert!(
        subsystems
            .as_array()
            .unwrap()
            .contains(&json!({"subsystem": "vhost_blk", "depends_on": ["bdev"]}))
    );
    let (code, message) = client.fail("framework_get_config", r#"{"name":"vhost"}"#);
    assert_eq!(code, -32602);
    assert!(message.contains("did you mean \"vhost_blk\"?"), "{message}");
    let reactors = client.call("framework_get_reactors", "{}");
    assert_eq!(reactors["tick_rate"], 2_500_000_000_u64);
    let want = [
        "bounces",
        "busy",
        "idle",
        "in_interrupt",
        "irq",
        "lcore",
        "lw_threads",
        "sys",
        "tid",
        "usr",
    ];
    assert_eq!(keys(&reactors["reactors"][0]), BTreeSet::from(want));
    let threads = client.call("thread_get_stats", "{}");
    assert_eq!(threads["threads"][0]["timed_pollers_count"], 1);
    let pollers = client.call("thread_get_pollers", "{}");
    assert_eq!(pollers["threads"][0]["timed_pollers"][0]["period_ticks"], 250_000);
    assert_eq!(pollers["threads"][0]["paused_pollers"], json!([]));
    assert_eq!(client.call("framework_get_scheduler", "{}")["scheduler_name"], "static");
    for name in ["SIGTERM", "sigterm", "TERM", "15"] {
        assert_eq!(client.call("spdk_kill_instance", &json!({"sig_name": name}).to_string()), true);
    }
    assert_eq!(client.fail("spdk_kill_instance", r#"{"sig_name":"SIGTREM"}"#).0, -32602);
    for method in ["log_set_level", "log_set_print_level"] {
        assert_eq!(client.call(method, r#"{"level":"WARNING"}"#), true);
        assert_eq!(client.fail(method, r#"{"level":"LOUD"}"#).0, -32602);
    }
    assert_eq!(client.call("log_get_level", "{}"), "WARNING");
    assert_eq!(client.call("log_get_print_level", "{}"), "WARNING");
    assert_eq!(client.call("reactor_set_idle", r#"{"policy":"poll","spin_us":10}"#), true);
    assert_eq!(client.call("framework_get_reactors", "{}")["idle_policy"], "poll");
    assert_eq!(client.fail("reactor_set_idle", r#"{"policy":"sleepy"}"#).0, -32602);
}

#[test]
fn every_method_refuses_an_unknown_parameter_by_name() {
    let (_daemon, mut client) = daemon_with_disk();
    for method in METHODS {
        let (code, message) = client.fail(method.name, r#"{"bogus_thing":1}"#);
        assert_eq!(code, -32602, "{}", method.name);
        assert!(message.contains("bogus_thing"), "{message}");
        for param in method.params.iter().filter(|param| param.required) {
            let (code, message) = client.fail(method.name, "{}");
            assert_eq!(code, -32602);
            assert!(message.contains("needs the parameter"), "{}: {message}", param.name);
        }
    }
}

#[test]
fn bdevs_are_made_listed_resized_and_deleted() {
    let (daemon, mut client) = daemon_with_disk();
    let image = daemon.dir().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let malloc =
        r#"{"num_blocks":16,"block_size":4096,"md_interleave":false,"dif_is_head_of_md":false}"#;
    assert_eq!(client.call("bdev_malloc_create", malloc), "Malloc0");
    assert_eq!(client.call("bdev_malloc_create", malloc), "Malloc1");
    let uring = json!({"name": "u0", "filename": image, "block_size": 512, "cache": "writeback"})
        .to_string();
    assert_eq!(client.call("bdev_uring_create", &uring), "u0");
    let aio = json!({"name": "a0", "filename": image, "readonly": false, "fallocate": false, "nowait": false});
    assert_eq!(client.call("bdev_aio_create", &aio.to_string()), "a0");

    let all = client.call("bdev_get_bdevs", "null");
    assert_eq!(all.as_array().unwrap().len(), 5);
    let one = client.call("bdev_get_bdevs", r#"{"name":"u0"}"#);
    let bdev = &one[0];
    for key in [
        "name",
        "aliases",
        "product_name",
        "block_size",
        "num_blocks",
        "uuid",
        "assigned_rate_limits",
        "claimed",
        "zoned",
        "supported_io_types",
        "driver_specific",
    ] {
        assert!(bdev.get(key).is_some(), "{key}");
    }
    assert_eq!(bdev["num_blocks"], 2048);
    assert_eq!(bdev["supported_io_types"].as_object().unwrap().len(), 20);
    assert_eq!(bdev["driver_specific"]["uring"]["cache"], "writeback");
    assert_eq!(client.fail("bdev_get_bdevs", r#"{"name":"nope"}"#).0, -19);
    assert_eq!(client.fail("bdev_get_bdevs", r#"{"name":"nope","timeout":30}"#).0, -19);

    assert_eq!(client.call("bdev_null_resize", r#"{"name":"Null0","new_size":4}"#), true);
    assert_eq!(client.call("bdev_get_bdevs", r#"{"name":"Null0"}"#)[0]["num_blocks"], 8192);
    assert_eq!(client.fail("bdev_null_resize", r#"{"name":"Null0","new_size":0}"#).0, -32602);
    assert_eq!(client.fail("bdev_null_resize", r#"{"name":"u0","new_size":4}"#).0, -19);
    assert_eq!(client.call("bdev_uring_rescan", r#"{"name":"u0"}"#), true);
    assert_eq!(client.call("bdev_aio_rescan", r#"{"name":"a0"}"#), true);

    assert_eq!(
        client.fail("bdev_null_create", r#"{"name":"Null0","num_blocks":1,"block_size":512}"#).0,
        -17
    );
    for (method, name) in [
        ("bdev_null_delete", "Null0"),
        ("bdev_malloc_delete", "Malloc0"),
        ("bdev_malloc_delete", "Malloc1"),
        ("bdev_uring_delete", "u0"),
        ("bdev_aio_delete", "a0"),
    ] {
        let params = json!({"name": name}).to_string();
        assert_eq!(client.call(method, &params), true);
        assert_eq!(client.fail(method, &params).0, -19);
    }
    assert_eq!(client.call("bdev_get_bdevs", "{}"), json!([]));
}

#[test]
fn bad_disks_are_refused_with_the_value_and_what_to_do() {
    let (_daemon, mut client) = daemon_with_disk();
    for (method, params, code, words) in [
        (
            "bdev_null_create",
            r#"{"name":"n","num_blocks":0,"block_size":512}"#,
            -32602,
            "at least 1",
        ),
        (
            "bdev_null_create",
            r#"{"name":"n","num_blocks":18446744073709551615,"block_size":512}"#,
            -32602,
            "at most",
        ),
        ("bdev_null_create", r#"{"name":"n","num_blocks":8,"block_size":513}"#, -32602, "513"),
        ("bdev_null_create", r#"{"name":"n","num_blocks":8.5,"block_size":512}"#, -32602, "8.5"),
        (
            "bdev_null_create",
            r#"{"name":"n","num_blocks":8,"block_size":512,"md_size":8}"#,
            -32602,
            "not supported",
        ),
        (
            "bdev_null_create",
            r#"{"name":"n\n","num_blocks":8,"block_size":512}"#,
            -32602,
            "control",
        ),
        (
            "bdev_null_create",
            r#"{"name":"n","num_blocks":8,"block_size":512,"uuid":"x"}"#,
            -32602,
            "not a UUID",
        ),
        (
            "bdev_malloc_create",
            r#"{"num_blocks":8,"block_size":512,"md_interleave":true}"#,
            -32602,
            "md_interleave",
        ),
        ("bdev_uring_create", r#"{"name":"u","filename":"/no/such/file"}"#, -2, "/no/such/file"),
        (
            "bdev_uring_create",
            r#"{"name":"u","filename":"/x","cache":"writebak"}"#,
            -32602,
            "writeback",
        ),
        ("bdev_aio_create", r#"{"name":"u","filename":"/x","nowait":true}"#, -32602, "nowait"),
    ] {
        let (got, message) = client.fail(method, params);
        assert_eq!(got, code, "{params}: {message}");
        assert!(message.contains(words), "{params}: {message}");
    }
    assert_eq!(
        client.call("bdev_get_bdevs", "{}").as_array().unwrap().len(),
        1,
        "nothing half-made"
    );
}

#[test]
fn a_client_can_wait_for_a_bdev_to_appear() {
    let (daemon, mut client) = daemon_with_disk();
    client.send(r#"{"method":"bdev_get_bdevs","params":{"name":"later","timeout":5000},"id":1}"#);
    let mut other = daemon.connect();
    other.call("bdev_null_create", r#"{"name":"later","num_blocks":8,"block_size":512}"#);
    assert_eq!(client.receive().unwrap()["result"][0]["name"], "later");
}

#[test]
fn counters_and_histograms_have_the_known_shapes() {
    let (_daemon, mut client) = daemon_with_disk();
    let stats = client.call("bdev_get_iostat", r#"{"per_channel":false}"#);
    assert_eq!(keys(&stats), BTreeSet::from(["bdevs", "tick_rate", "ticks"]));
    for key in
        ["bytes_read", "num_read_ops", "bytes_unmapped", "max_read_latency_ticks", "num_flush_ops"]
    {
        assert!(stats["bdevs"][0].get(key).is_some(), "{key}");
    }
    let channels = client.call("bdev_get_iostat", r#"{"names":["Null0"],"per_channel":true}"#);
    assert_eq!(
        (&channels["name"], &channels["channels"][0]["thread_id"]),
        (&json!("Null0"), &json!(1))
    );
    assert_eq!(client.fail("bdev_get_iostat", r#"{"per_channel":true}"#).0, -22);
    assert_eq!(client.fail("bdev_get_iostat", r#"{"names":["a"],"name":"b"}"#).0, -22);
    assert_eq!(client.fail("bdev_get_iostat", r#"{"name":"b"}"#).0, -19);
    assert_eq!(client.call("bdev_reset_iostat", r#"{"name":"Null0","mode":"maxmin"}"#), true);
    assert_eq!(client.fail("bdev_reset_iostat", r#"{"name":"x"}"#).0, -19);

    assert_eq!(client.fail("bdev_get_histogram", r#"{"name":"Null0"}"#).0, -14);
    assert_eq!(client.call("bdev_enable_histogram", r#"{"name":"Null0","enable":true}"#), true);
    assert_eq!(client.fail("bdev_enable_histogram", r#"{"name":"x","enable":true}"#).0, -19);
    assert_eq!(
        client.fail("bdev_enable_histogram", r#"{"name":"Null0","enable":true,"opc":"fly"}"#).0,
        -32602
    );
    let histogram = client.call("bdev_get_histogram", r#"{"name":"Null0"}"#);
    assert_eq!((&histogram["granularity"], &histogram["max_range"]), (&json!(7), &json!(57)));
    let bytes = STANDARD.decode(histogram["histogram"].as_str().unwrap()).unwrap();
    assert_eq!(bytes.len(), 58 * 128 * 8);
    let total: u64 = bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).sum();
    assert_eq!(total, 5);
    let borders =
        client.call("bdev_get_histogram_borders", r#"{"name":"Null0","borders":[1,3,10]}"#);
    assert_eq!(borders, json!({"borders_count": [2, 3, 4, 5]}));
    assert_eq!(
        client.fail("bdev_get_histogram_borders", r#"{"name":"Null0","borders":[3,1]}"#).0,
        -32602
    );
    assert_eq!(client.fail("bdev_get_histogram_borders", r#"{"name":"x","borders":[3]}"#).0, -19);
}

#[test]
fn controllers_are_made_listed_and_deleted() {
    let (_daemon, mut client) = daemon_with_disk();
    for (params, words) in [
        (r#"{"ctrlr":"v0","dev_name":"nope"}"#, "no bdev \"nope\""),
        (r#"{"ctrlr":"v0","dev_name":"Null0","cpumask":"0x10"}"#, "core 4"),
        (r#"{"ctrlr":"v0","dev_name":"Null0","cpumask":"zz"}"#, "0x5"),
        (r#"{"ctrlr":"../v0","dev_name":"Null0"}"#, "cannot be a path"),
        (r#"{"ctrlr":"v0","dev_name":"Null0","serial":"123456789012345678901"}"#, "20"),
        (r#"{"ctrlr":"v0","dev_name":"Null0","transport":"vfio_user_blk"}"#, "vhost_user_blk only"),
        (r#"{"ctrlr":"v0","dev_name":"Null0","num_queues":0}"#, "at least one queue"),
    ] {
        let (code, message) = client.fail("vhost_create_blk_controller", params);
        assert_eq!(code, -32602, "{message}");
        assert!(message.contains(words), "{message}");
    }
    let params = r#"{"ctrlr":"slow.v0","dev_name":"Null0","cpumask":"0x1","readonly":false,"packed_ring":true}"#;
    assert_eq!(client.call("vhost_create_blk_controller", params), true);
    assert_eq!(client.fail("vhost_create_blk_controller", params).0, -32602);
    assert_eq!(
        client.fail("vhost_create_blk_controller", r#"{"ctrlr":"v1","dev_name":"Null0"}"#).0,
        -32602
    );
    assert_eq!(client.fail("bdev_null_delete", r#"{"name":"Null0"}"#).0, -16);
    let set = r#"{"ctrlr":"slow.v0","delay_base_us":20,"iops_threshold":60000}"#;
    assert_eq!(client.call("vhost_controller_set_coalescing", set), true);
    let unknown = r#"{"ctrlr":"x","delay_base_us":20,"iops_threshold":60000}"#;
    assert_eq!(client.fail("vhost_controller_set_coalescing", unknown).0, -32602);
    let place = |params| ("vhost_controller_set_cpumask", params);
    for (params, words) in [
        (r#"{"ctrlr":"x","cpumask":"0x1"}"#, "no controller \"x\""),
        (r#"{"ctrlr":"slow.v0","cpumask":"0x4"}"#, "core 2"),
        (r#"{"ctrlr":"slow.v0","cpumask":"0x0"}"#, "names no core"),
        (r#"{"ctrlr":"slow.v0"}"#, "needs the parameter \"cpumask\""),
        (r#"{"ctrlr":"slow.v0","cpumask":"0x1","queue":7}"#, "no queue 7"),
        (r#"{"ctrlr":"slow.v0","cpumask":"0x1","queue":64}"#, "from 0 to 63"),
    ] {
        let (method, params) = place(params);
        let (code, message) = client.fail(method, params);
        assert_eq!(code, -32602, "{message}");
        assert!(message.contains(words), "{message}");
    }
    let (method, params) = place(r#"{"ctrlr":"slow.v0","cpumask":"[1]"}"#);
    assert_eq!(client.call(method, params), true);
    assert_eq!(client.call("vhost_get_controllers", "null")[0]["cpumask"], "0x2");
    let (method, params) = place(r#"{"ctrlr":"slow.v0","cpumask":"0x1"}"#);
    assert_eq!(client.call(method, params), true);
    let listed = client.call("vhost_get_controllers", r#"{"name":"slow.v0"}"#);
    assert_eq!(listed, client.call("vhost_get_controllers", "null"));
    assert_eq!(listed[0]["cpumask"], "0x1");
    assert_eq!(listed[0]["delay_base_us"], 20);
    assert_eq!(listed[0]["backend_specific"]["block"]["bdev"], "Null0");
    assert_eq!(listed[0]["sessions"][0]["inflight_task_cnt"], 2);
    assert_eq!(listed[0]["sessions"][0]["queues"][0]["lcore"], 0);
    assert_eq!(client.fail("vhost_get_controllers", r#"{"name":"x"}"#).0, -32602);

    let latencies = client.call("latency_get_histograms", "{}");
    assert_eq!(latencies["histograms"].as_array().unwrap().len(), 4);
    let row = &latencies["histograms"][0];
    assert_eq!(row["count"], 5);
    assert!(row["hdr"].as_str().unwrap().starts_with("HISTFAAA"), "the V2-compressed cookie");
    assert_eq!(client.fail("latency_get_histograms", r#"{"ctrlr":"x"}"#).0, -32602);
    assert_eq!(client.fail("latency_get_histograms", r#"{"bdev":"x"}"#).0, -19);
    assert_eq!(client.call("latency_reset_histograms", r#"{"ctrlr":"slow.v0"}"#), true);
    assert_eq!(client.fail("latency_reset_histograms", r#"{"ctrlr":"x"}"#).0, -32602);

    assert_eq!(client.call("vhost_delete_controller", r#"{"ctrlr":"slow.v0"}"#), true);
    assert_eq!(client.fail("vhost_delete_controller", r#"{"ctrlr":"slow.v0"}"#).0, -32602);
    assert_eq!(client.call("bdev_null_delete", r#"{"name":"Null0"}"#), true);
}

/// What SPDK's client does in `save_config`.
fn save(client: &mut Client) -> Value {
    let subsystems = client.call("framework_get_subsystems", "{}");
    subsystems
        .as_array()
        .unwrap()
        .iter()
        .map(|s| {
            let name = s["subsystem"].as_str().unwrap();
            let config = client.call("framework_get_config", &json!({"name": name}).to_string());
            json!({"subsystem": name, "config": config})
        })
        .collect()
}

#[test]
fn a_saved_configuration_makes_the_same_disks_again() {
    let (_daemon, mut client) = daemon_with_disk();
    client.call("reactor_set_idle", r#"{"policy":"adaptive","spin_us":30}"#);
    client.call("bdev_malloc_create", r#"{"num_blocks":16,"block_size":512}"#);
    client.call("bdev_malloc_create", r#"{"name":"slow9","num_blocks":16,"block_size":512}"#);
    client.call(
        "vhost_create_blk_controller",
        r#"{"ctrlr":"v0","dev_name":"Malloc0","serial":"abc"}"#,
    );
    client.call("vhost_create_blk_controller", r#"{"ctrlr":"slow.v1","dev_name":"Null0"}"#);
    client.call(
        "vhost_controller_set_coalescing",
        r#"{"ctrlr":"v0","delay_base_us":5,"iops_threshold":1}"#,
    );
    for params in [
        r#"{"ctrlr":"v0","cpumask":"0x3","queue":0}"#,
        r#"{"ctrlr":"v0","cpumask":"0x3"}"#,
        r#"{"ctrlr":"v0","cpumask":"0x1","queue":0}"#,
        r#"{"ctrlr":"v0","cpumask":"0x2","queue":0}"#,
    ] {
        client.call("vhost_controller_set_cpumask", params);
    }
    client.call("bdev_null_resize", r#"{"name":"Null0","new_size":2}"#);
    client.call("vhost_delete_controller", r#"{"ctrlr":"slow.v1"}"#);
    client.call("bdev_malloc_delete", r#"{"name":"slow9"}"#);
    client.fail("bdev_null_create", r#"{"name":"Null0","num_blocks":1,"block_size":512}"#);
    let saved = save(&mut client);
    let methods: Vec<&str> = saved
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|s| s["config"].as_array().unwrap())
        .map(|call| call["method"].as_str().unwrap())
        .collect();
    assert_eq!(
        methods,
        [
            "reactor_set_idle",
            "bdev_null_create",
            "bdev_malloc_create",
            "vhost_create_blk_controller",
            "vhost_controller_set_coalescing",
            "vhost_controller_set_cpumask",
            "vhost_controller_set_cpumask"
        ]
    );
    assert_eq!(saved[2]["config"][3]["params"], json!({"ctrlr":"v0","cpumask":"0x2","queue":0}));
    let second = FakeDaemon::start();
    let mut other = second.connect();
    for call in saved.as_array().unwrap().iter().flat_map(|s| s["config"].as_array().unwrap()) {
        other.call(call["method"].as_str().unwrap(), &call["params"].to_string());
    }
    assert_eq!(save(&mut other), saved);
    let (a, b) = (client.call("bdev_get_bdevs", "{}"), other.call("bdev_get_bdevs", "{}"));
    assert_eq!(a, b, "same names, sizes and UUIDs");
}

/// What SPDK's client sends when nothing but the required is said on its command line.
const ATTACH: &str = r#"{"name":"Nvme0","trtype":"pcie","traddr":"01:00.0","prchk_reftag":false,"prchk_guard":false,
    "hdgst":false,"ddgst":false,"allow_unrecognized_csi":false,"adrfam":null,"multipath":null,"psk":null}"#;

#[test]
fn nvme_controllers_are_attached_listed_and_detached_as_spdks_are() {
    let (_daemon, mut client) = daemon_with_disk();
    assert_eq!(client.call("bdev_nvme_get_controllers", "{}"), json!([]));
    assert_eq!(client.call("bdev_nvme_attach_controller", ATTACH), json!(["Nvme0n1"]));
    assert_eq!(client.fail("bdev_nvme_attach_controller", ATTACH).0, -17);
    let shown = client.call("bdev_nvme_get_controllers", r#"{"name":"Nvme0"}"#);
    let controller = &shown[0]["ctrlrs"][0];
    assert_eq!(shown[0]["name"], "Nvme0");
    assert_eq!(controller["state"], "enabled");
    assert_eq!(controller["trid"], json!({"trtype": "PCIe", "traddr": "0000:01:00.0"}));
    assert_eq!(controller["cntlid"], 7);
    assert_eq!(keys(&controller["host"]), BTreeSet::from(["addr", "nqn", "svcid"]));
    assert_eq!(controller["counters"]["timeouts"], 3);
    assert_eq!(controller["namespaces"][0]["bdev"], "Nvme0n1");
    assert_eq!(controller["namespaces"][1]["bdev"], Value::Null);
    assert!(controller["namespaces"][1]["refused"].as_str().unwrap().contains("metadata"));

    let bdev = &client.call("bdev_get_bdevs", r#"{"name":"Nvme0n1"}"#)[0];
    assert_eq!(bdev["product_name"], "NVMe disk");
    let want = json!({
        "pci_address": "0000:01:00.0",
        "trid": {"trtype": "PCIe", "traddr": "0000:01:00.0"},
        "ctrlr_data": {
            "cntlid": 7,
            "vendor_id": "0x144d",
            "model_number": "Grindstone 9000",
            "serial_number": "RM0001",
            "firmware_revision": "1.0",
        },
        "vs": {"nvme_version": "1.4"},
        "ns_data": {"id": 1},
    });
    assert_eq!(bdev["driver_specific"], json!({"nvme": [want], "mp_policy": "active_passive"}));
    for method in
        ["bdev_null_delete", "bdev_malloc_delete", "bdev_uring_delete", "bdev_uring_rescan"]
    {
        let (code, message) = client.fail(method, r#"{"name":"Nvme0n1"}"#);
        assert_eq!(code, -19);
        assert!(message.contains("bdev_nvme_detach_controller"), "{message}");
    }

    for params in [r#"{"name":"Nvme0"}"#, r#"{"name":"Nvme0","cntlid":7}"#] {
        assert_eq!(client.call("bdev_nvme_reset_controller", params), true);
    }
    assert_eq!(
        client.fail("bdev_nvme_reset_controller", r#"{"name":"Nvme0","cntlid":8}"#).0,
        -32602
    );
    let health = client.call("bdev_nvme_get_controller_health_info", r#"{"name":"Nvme0"}"#);
    assert_eq!(health["temperature_celsius"], 37);
    assert_eq!(health["data_units_written"], u64::MAX, "as much as JSON readers take");
    assert_eq!(health["traddr"], "0000:01:00.0");
    let known = [
        "model_number",
        "serial_number",
        "firmware_revision",
        "traddr",
        "temperature_celsius",
        "available_spare_percentage",
        "available_spare_threshold_percentage",
        "percentage_used",
        "data_units_read",
        "data_units_written",
        "host_read_commands",
        "host_write_commands",
        "controller_busy_time",
        "power_cycles",
        "power_on_hours",
        "unsafe_shutdowns",
        "media_errors",
        "num_err_log_entries",
        "warning_temperature_time_minutes",
        "critical_composite_temperature_time_minutes",
    ];
    for key in known {
        assert!(health[key].is_string() || health[key].is_number(), "{key}: {health}");
    }

    for params in
        [r#"{"name":"Nvme0","traddr":"0000:02:00.0"}"#, r#"{"name":"Nvme0","trtype":"vfiouser"}"#]
    {
        let (code, message) = client.fail("bdev_nvme_detach_controller", params);
        assert_eq!(code, -19);
        assert!(message.contains("leave"), "{message}");
    }
    let params = r#"{"name":"Nvme0","trtype":"PCIE","traddr":"01:00.0","subnqn":null}"#;
    assert_eq!(client.call("bdev_nvme_detach_controller", params), true);
    for method in [
        "bdev_nvme_detach_controller",
        "bdev_nvme_reset_controller",
        "bdev_nvme_get_controllers",
        "bdev_nvme_get_controller_health_info",
    ] {
        let (code, message) = client.fail(method, r#"{"name":"Nvme0"}"#);
        assert_eq!(code, -19);
        assert!(message.contains("no NVMe controller \"Nvme0\""), "{message}");
    }
    assert_eq!(client.fail("bdev_get_bdevs", r#"{"name":"Nvme0n1"}"#).0, -19);
}

#[test]
fn a_vfio_user_controller_has_a_path_and_no_pci_address() {
    let (_daemon, mut client) = daemon_with_disk();
    let params = r#"{"name":"Nvme1","trtype":"VFIOUSER","traddr":"/run/vfu/1"}"#;
    client.call("bdev_nvme_attach_controller", params);
    let specific =
        &client.call("bdev_get_bdevs", r#"{"name":"Nvme1n1"}"#)[0]["driver_specific"]["nvme"][0];
    assert_eq!(specific["trid"], json!({"trtype": "VFIOUSER", "traddr": "/run/vfu/1"}));
    assert_eq!(specific.get("pci_address"), None);
}

#[test]
fn what_an_nvme_controller_cannot_be_told_is_refused() {
    let (_daemon, mut client) = daemon_with_disk();
    let mut refused = |method: &str, more: &str, words: &str| {
        let params = match method {
            "bdev_nvme_attach_controller" => {
                format!(r#"{{"name":"N","trtype":"PCIe","traddr":"0000:01:00.0",{more}}}"#)
            }
            _ => format!("{{{more}}}"),
        };
        let (code, message) = client.fail(method, &params);
        assert_eq!(code, -32602, "{more}: {message}");
        assert!(message.contains(words), "{more}: {message}");
    };
    let attach = "bdev_nvme_attach_controller";
    for (more, words) in [
        (r#""hdgst":true"#, "\"hdgst\" = true is not supported"),
        (r#""multipath":"failover""#, "multipath"),
        (r#""max_bdevs":4"#, "128 or 0"),
        (r#""subnqn":"nqn.x""#, "subnqn"),
        (r#""timeout_us":5"#, "10 ms"),
        (r#""io_queue_requests":1024"#, "1023"),
        (r#""action_on_timeout":"abrot""#, "did you mean \"abort\"?"),
    ] {
        refused(attach, more, words);
    }
    for (params, words) in [
        (r#"{"name":"N","trtype":"TCP","traddr":"x"}"#, "PCIe (VFIO) and vfiouser"),
        (r#"{"name":"N","trtype":"PCIe","traddr":"../../etc"}"#, "is not a PCI address"),
        (r#"{"name":"N","trtype":"PCIe","traddr":"0000:01:00.9"}"#, "is not a PCI address"),
        (r#"{"name":"N","trtype":"vfiouser","traddr":"run/x"}"#, "absolute path"),
        (r#"{"name":"N\n","trtype":"PCIe","traddr":"01:00.0"}"#, "control"),
    ] {
        let (code, message) = client.fail(attach, params);
        assert_eq!(code, -32602, "{params}: {message}");
        assert!(message.contains(words), "{params}: {message}");
    }
    let options = "bdev_nvme_set_options";
    let mut refused = |more: &str, words: &str| {
        let (code, message) = client.fail(options, &format!("{{{more}}}"));
        assert_eq!(code, -32602, "{more}: {message}");
        assert!(message.contains(words), "{more}: {message}");
    };
    for (more, words) in [
        (r#""delay_cmd_submit":false"#, "true"),
        (r#""bdev_retry_count":-1"#, "3"),
        (r#""keep_alive_timeout_ms":5"#, "10000 or 0"),
        (r#""ctrlr_loss_timeout_sec":30"#, "not supported"),
        (r#""dhchap_digests":["sha256"]"#, "not supported"),
        (r#""timeout_us":1"#, "10 ms"),
        (r#""timeout_admin_us":604800000001"#, "604800000000"),
    ] {
        refused(more, words);
    }
    assert_eq!(client.call("bdev_nvme_get_controllers", "{}"), json!([]), "nothing half-made");
}

#[test]
fn nvme_options_come_first_and_controllers_come_back() {
    let (_daemon, mut client) = daemon_with_disk();
    // As SPDK's client sends them, its own defaults among them.
    let options = r#"{"action_on_timeout":"reset","timeout_us":5000000,"delay_cmd_submit":true,
        "keep_alive_timeout_ms":10000,"disable_auto_failback":false,"generate_uuids":false,"nvme_error_stat":false,
        "io_path_stat":false,"allow_accel_sequence":false,"enable_flush":false,"dhchap_digests":[]}"#;
    assert_eq!(client.call("bdev_nvme_set_options", options), true);
    assert_eq!(client.call("bdev_nvme_set_options", r#"{"io_queue_requests":64}"#), true);
    client.call("bdev_nvme_attach_controller", ATTACH);
    let own =
        r#"{"name":"Nvme1","trtype":"vfiouser","traddr":"/s","num_io_queues":1,"timeout_us":0}"#;
    client.call("bdev_nvme_attach_controller", own);
    let (code, message) = client.fail("bdev_nvme_set_options", r#"{"timeout_us":0}"#);
    assert_eq!(code, -1, "{message}");
    client.call("vhost_create_blk_controller", r#"{"ctrlr":"v0","dev_name":"Nvme0n1"}"#);
    let saved = save(&mut client);
    let calls = saved[1]["config"].as_array().unwrap();
    let methods: Vec<&str> = calls.iter().map(|call| call["method"].as_str().unwrap()).collect();
    let attach = "bdev_nvme_attach_controller";
    assert_eq!(methods, ["bdev_nvme_set_options", "bdev_null_create", attach, attach]);
    assert_eq!(
        calls[0]["params"],
        json!({
            "action_on_timeout": "reset",
            "timeout_us": 5_000_000,
            "timeout_admin_us": 10_000_000,
            "io_queue_requests": 64,
        })
    );
    let second = FakeDaemon::start();
    let mut other = second.connect();
    for call in saved.as_array().unwrap().iter().flat_map(|s| s["config"].as_array().unwrap()) {
        other.call(call["method"].as_str().unwrap(), &call["params"].to_string());
    }
    assert_eq!(save(&mut other), saved);
    // A controller takes what needs it along.
    client.call("bdev_nvme_detach_controller", r#"{"name":"Nvme0"}"#);
    let saved = save(&mut client);
    assert_eq!(saved[1]["config"].as_array().unwrap().len(), 3);
    assert_eq!(saved[2]["config"], json!([]));
}
