//! `ringmillctl` as people and scripts run it, against the real RPC server over an engine in memory.

mod support;

use std::{
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::Path,
};

use assert_cmd::Command;
use serde_json::Value;
use support::FakeDaemon;

fn ctl(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("ringmillctl").unwrap();
    command.env_clear().arg("--socket").arg(socket).args(args);
    command
}

fn good(daemon: &FakeDaemon, args: &[&str]) -> String {
    let output = ctl(&daemon.socket, args).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    stdout.replace(daemon.dir().to_str().unwrap(), "/dir")
}

/// The width of columns depends on where temporary directories are.
fn narrow(text: &str) -> String {
    let lines =
        text.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).map(str::trim));
    lines.map(|cells| cells.collect::<Vec<_>>().join(" | ")).collect::<Vec<_>>().join("\n")
}

/// Exit status and standard error.
fn bad(daemon: &FakeDaemon, args: &[&str]) -> (i32, String) {
    let output = ctl(&daemon.socket, args).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_disk_is_added_shown_resized_and_removed() {
    let daemon = FakeDaemon::start();
    let image = daemon.dir().join("vm1.raw");
    std::fs::write(&image, vec![0; 3 << 20]).unwrap();
    let file = image.to_str().unwrap();
    let added = good(
        &daemon,
        &["disk", "add", "vm1", "--file", file, "--serial", "S1", "--readonly", "--cores", "0x1"],
    );
    assert_eq!(added, "disk vm1 is there; its guest connects to /dir/vm1\n");
    assert_eq!(
        good(
            &daemon,
            &["disk", "add", "scratch", "--ram", "64M", "--block-size", "4k", "--no-controller"]
        ),
        "disk scratch is there, without a socket\n"
    );
    good(&daemon, &["disk", "add", "bench", "--null", "1.5G"]);
    insta::assert_snapshot!("disk_list", narrow(&good(&daemon, &["disk", "list"])));
    let status = good(&daemon, &["status"]).replace(&std::process::id().to_string(), "PID");
    insta::assert_snapshot!("status", narrow(&status));
    assert_eq!(good(&daemon, &["disk", "resize", "bench", "2G"]), "disk bench has 2 GiB now\n");
    assert_eq!(good(&daemon, &["disk", "resize", "vm1"]), "disk vm1 has 3 MiB now\n");
    let (status, message) = bad(&daemon, &["disk", "resize", "vm1", "1G"]);
    assert_eq!(status, 2);
    assert!(message.contains("truncate -s 1G"), "{message}");
    for name in ["vm1", "scratch", "bench"] {
        good(&daemon, &["disk", "remove", name]);
    }
    assert!(good(&daemon, &["disk", "list"]).contains("no disks"));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 3 << 20, "the image stays");
}

#[test]
fn a_disk_whose_socket_cannot_be_made_is_taken_back() {
    let daemon = FakeDaemon::start();
    let (status, message) =
        bad(&daemon, &["disk", "add", "vm1", "--ram", "1M", "--cores", "0x100"]);
    assert_eq!(status, 1);
    assert!(message.contains("core 8 is not one of the daemon's"), "{message}");
    assert!(good(&daemon, &["disk", "list"]).contains("no disks"));
}

#[test]
fn exit_status_tells_refusal_usage_and_absence_apart() {
    let daemon = FakeDaemon::start();
    for (args, status, words) in [
        (&["disk", "remove", "nope"][..], 1, "no bdev \"nope\""),
        (&["call", "bdev_null_delete", "name=nope"], 1, "no bdev"),
        (&["call", "no_such_method"], 1, "Method not found"),
        (&["call", "bdev_null_delete"], 2, "needs the parameter \"name\""),
        (&["call", "bdev_null_delete", "nam=x"], 2, "did you mean \"name\"?"),
        (&["disk", "add", "x"], 2, "required"),
        (&["disk", "add", "x", "--ram", "1G", "--null", "1G"], 2, "cannot be used with"),
        (&["disk", "add", "x", "--ram", "lots"], 2, "\"lots\" is not a size"),
        (&["disk", "add", "x", "--ram", "1000"], 2, "multiple"),
        (&["disk", "add", "x", "--file", "/no/such/image"], 1, "/no/such/image"),
        (&["frobnicate"], 2, "unrecognized subcommand"),
        (&["help", "dsik"], 2, "did you mean \"disk\"?"),
        (&["hist", "show", "nope"], 1, "no controller \"nope\""),
        (&["hist", "dump", "a.txt"], 2, ".hlog"),
        (&["load-config", "/no/such.toml"], 2, "/no/such.toml"),
        (&["load-config", "/etc/passwd"], 2, ".toml or a .json"),
    ] {
        let (got, message) = bad(&daemon, args);
        assert_eq!(got, status, "{args:?}: {message}");
        assert!(message.contains(words), "{args:?}: {message}");
    }
    let (status, message) = bad(&daemon, &["--json", "disk", "remove", "nope"]);
    let error: Value = serde_json::from_str(&message).unwrap();
    assert_eq!((status, &error["error"]["code"]), (1, &(-19).into()));

    let gone = daemon.dir().join("gone.sock");
    let output = ctl(&gone, &["status"]).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(message.contains("start the daemon with `ringmilld`"), "{message}");
    drop(UnixListener::bind(&gone).unwrap());
    assert_eq!(ctl(&gone, &["status"]).output().unwrap().status.code(), Some(3));
}

#[test]
fn a_stranger_on_the_socket_is_told_apart_from_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        stream.write_all(b"220 smtp ready\r\n").unwrap();
        let (stream, _) = listener.accept().unwrap();
        drop(stream);
        let (stream, _) = listener.accept().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1500));
        drop(stream);
    });
    for (args, words) in [
        (&["call", "log_get_level"][..], "closed the connection"),
        (&["call", "log_get_level"], "closed the connection"),
        (&["call", "log_get_level", "--timeout", "1"], "no answer"),
    ] {
        let output = ctl(&socket, args).output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(
            message.contains(words) || message.contains("does not speak JSON-RPC"),
            "{message}"
        );
    }
    thread.join().unwrap();
}

#[test]
fn latencies_are_shown_and_dumped() {
    let daemon = FakeDaemon::start();
    assert!(good(&daemon, &["hist", "show"]).contains("no requests yet"));
    good(&daemon, &["disk", "add", "vm1", "--ram", "1M"]);
    insta::assert_snapshot!("hist_show", good(&daemon, &["hist", "show", "vm1"]));
    assert!(good(&daemon, &["hist", "show", "--per-queue", "--no-plot"]).contains("queue 0"));
    let dir = tempfile::tempdir().unwrap();
    for (name, begin) in [("a.json", "{"), ("a.hlog", "#[Histogram log format"), ("a.svg", "<svg")]
    {
        let path = dir.path().join(name);
        good(&daemon, &["hist", "dump", path.to_str().unwrap()]);
        assert!(std::fs::read_to_string(&path).unwrap().starts_with(begin), "{name}");
    }
    assert!(
        good(&daemon, &["hist", "dump", "--format", "hlog", "-"]).contains("Tag=vm1/q0/read/total")
    );
    good(&daemon, &["hist", "reset", "vm1"]);
}

#[test]
fn a_saved_configuration_loads_again() {
    let daemon = FakeDaemon::start();
    good(&daemon, &["disk", "add", "slow1", "--ram", "1M"]);
    good(&daemon, &["disk", "add", "n1", "--null", "1G", "--no-controller"]);
    let path = daemon.dir().join("saved.json");
    good(&daemon, &["save-config", path.to_str().unwrap()]);
    let other = FakeDaemon::start();
    assert!(good(&other, &["load-config", path.to_str().unwrap()]).contains("3 calls"));
    assert_eq!(good(&daemon, &["save-config"]), good(&other, &["save-config"]));
    let (status, message) = bad(&other, &["load-config", path.to_str().unwrap()]);
    assert_eq!(status, 1);
    assert!(message.contains("subsystem \"bdev\", call 1 (bdev_malloc_create)"), "{message}");

    let toml = daemon.dir().join("more.toml");
    std::fs::write(&toml, "[[disk]]\nname = \"t1\"\nbackend = \"malloc\"\nsize = \"1MiB\"\n")
        .unwrap();
    assert!(good(&daemon, &["load-config", toml.to_str().unwrap()]).contains("2 calls"));
    std::fs::write(&toml, "[daemon]\ncores = \"0x1\"\n").unwrap();
    let (status, message) = bad(&daemon, &["load-config", toml.to_str().unwrap()]);
    assert_eq!(status, 2);
    assert!(message.contains("ringmilld -c"), "{message}");
}

#[test]
fn help_teaches_without_a_daemon() {
    let nowhere = Path::new("/no/such.sock");
    let text =
        |args: &[&str]| String::from_utf8(ctl(nowhere, args).output().unwrap().stdout).unwrap();
    insta::assert_snapshot!("help_method", text(&["help", "bdev_aio_create"]));
    assert!(text(&["help"]).contains("vhost_create_blk_controller"));
    assert!(text(&["help", "disk"]).contains("resize"));
    assert!(text(&["--help"]).contains("Exit status"));
    assert!(text(&["completions", "bash"]).contains("ringmillctl"));
}

#[test]
fn an_nvme_controller_is_attached_shown_to_a_guest_and_detached() {
    let daemon = FakeDaemon::start();
    assert!(good(&daemon, &["nvme", "list"]).contains("no NVMe controllers"));
    let said = good(&daemon, &["nvme", "attach", "Nvme0", "--pci", "01:00.0", "--queues", "2"]);
    assert!(said.starts_with("controller Nvme0 is there with Nvme0n1; "), "{said}");
    good(
        &daemon,
        &[
            "nvme",
            "attach",
            "Nvme1",
            "--vfio-user",
            "/run/vfu/1",
            "--timeout-ms",
            "0",
            "--timeout-admin-ms",
            "70",
        ],
    );
    let added = good(&daemon, &["disk", "add", "vm1", "--bdev", "Nvme0n1", "--pin", "off"]);
    assert_eq!(added, "disk vm1 is there; its guest connects to /dir/vm1\n");
    let shown = good(&daemon, &["call", "vhost_get_controllers"]);
    assert!(shown.contains("\"serial\": \"vm1\""), "the disk's name, not the namespace's: {shown}");
    insta::assert_snapshot!("nvme_list", narrow(&good(&daemon, &["nvme", "list"])));
    insta::assert_snapshot!("nvme_health", good(&daemon, &["nvme", "health", "Nvme0"]));
    insta::assert_snapshot!("nvme_disks", narrow(&good(&daemon, &["disk", "list"])));
    assert!(good(&daemon, &["nvme", "reset", "Nvme0"]).contains("was reset"));
    let said = good(&daemon, &["disk", "remove", "Nvme0n1"]);
    assert!(said.contains("ringmillctl nvme detach"), "{said}");
    assert!(!good(&daemon, &["disk", "list"]).contains("/dir/vm1"), "its socket is gone");
    let saved = good(&daemon, &["save-config"]);
    for args in [&["--json", "nvme", "list"][..], &["--json", "nvme", "health", "Nvme1"]] {
        assert!(serde_json::from_str::<Value>(&good(&daemon, args)).is_ok());
    }
    for name in ["Nvme0", "Nvme1"] {
        good(&daemon, &["nvme", "detach", name]);
    }
    assert!(good(&daemon, &["disk", "list"]).contains("no disks"));
    assert!(saved.contains("bdev_nvme_attach_controller"));
    for (args, status, words) in [
        (&["nvme", "attach", "N"][..], 2, "required"),
        (&["nvme", "attach", "N", "--pci", "nvme0"], 2, "is not a PCI address"),
        (
            &["nvme", "attach", "N", "--pci", "01:00.0", "--vfio-user", "/x"],
            2,
            "cannot be used with",
        ),
        (&["nvme", "detach", "Nvme0"], 1, "no NVMe controller \"Nvme0\""),
        (&["disk", "add", "x", "--bdev", "Nvme0n1"], 1, "no bdev"),
        (&["disk", "add", "x", "--bdev", "a", "--no-controller"], 2, "cannot be used with"),
    ] {
        let (got, message) = bad(&daemon, args);
        assert_eq!(got, status, "{args:?}: {message}");
        assert!(message.contains(words), "{args:?}: {message}");
    }
}

#[test]
fn every_choice_of_an_image_reaches_the_daemon() {
    let daemon = FakeDaemon::start();
    let image = daemon.dir().join("vm1.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let file = image.to_str().unwrap();
    good(
        &daemon,
        &["disk", "add", "a", "--file", file, "--iopoll", "--transfers", "ring", "--pin", "on"],
    );
    let saved = good(&daemon, &["save-config"]);
    for words in ["\"iopoll\": true", "\"transfers\": \"ring\"", "\"pin\": \"on\""] {
        assert!(saved.contains(words), "{words}: {saved}");
    }
}

#[test]
fn pci_needs_no_daemon_and_tells_refusal_from_usage() {
    let tree = tempfile::tempdir().unwrap();
    let tree_dir = tree.path().to_str().unwrap();
    let nowhere = Path::new("/no/such.sock");
    let run = |args: &[&str]| {
        let mut words = vec!["pci", "--tree", tree_dir];
        words.extend(args);
        let output = ctl(nowhere, &words).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let function = tree.path().join("sys/bus/pci/devices/0000:01:00.0");
    std::fs::create_dir_all(&function).unwrap();
    for (name, text) in [("class", "0x010802"), ("vendor", "0x144d"), ("device", "0xa80a")] {
        std::fs::write(function.join(name), text).unwrap();
    }
    let (status, table, _) = run(&["list"]);
    assert_eq!(status, 0);
    assert!(table.contains("0000:01:00.0  144d:a80a  NVMe controller, Samsung"), "{table}");
    let (_, rows, _) = run(&["list", "--json"]);
    let rows: Value = serde_json::from_str(&rows).unwrap();
    assert_eq!(rows[0]["driver"], Value::Null);
    for (args, status, words) in [
        (&["bind", "01:00.0"][..], 1, "modprobe vfio-pci"),
        (&["bind", "02:00.0"], 1, "there is no PCI function 0000:02:00.0"),
        (&["unbind", "/dev/nvme0n1"], 2, "is not a PCI address"),
        (&["bind"], 2, "required"),
        (&["unbind", "01:00.0"], 1, "driver_override"),
    ] {
        let (got, _, message) = run(args);
        assert_eq!(got, status, "{args:?}: {message}");
        assert!(message.contains(words), "{args:?}: {message}");
    }
    let (_, _, message) = run(&["--json", "bind", "01:00.0"]);
    assert!(message.starts_with("{\"error\""), "{message}");
}

#[test]
fn scripts_get_json_everywhere() {
    let daemon = FakeDaemon::start();
    for args in [
        &["disk", "add", "vm1", "--ram", "1M"][..],
        &["disk", "list"],
        &["status"],
        &["hist", "show"],
        &["call", "bdev_get_bdevs"],
        &["save-config"],
        &["disk", "remove", "vm1"],
    ] {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        let text = good(&daemon, &with_json);
        assert!(serde_json::from_str::<Value>(&text).is_ok(), "{args:?}: {text}");
    }
}
