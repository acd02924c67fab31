//! What is measured, section by section. Each starts a daemon of its own and describes its points; `lab` runs them.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use ringmill_core::reactor::tick_rate;
use serde_json::{Value, json};

use crate::lab::{Lab, Point, Who, figure};
use crate::medium;
use crate::reference::Copier;
use crate::results::{Figure, Row, Section};
use crate::servers::{NvmeModel, Ringmilld, StorageDaemon, fio, fio_args};

/// Names, in the order of the report, and what measures them.
pub(crate) const SECTIONS: &[(&str, Measure)] = &[
    ("depth", depth),
    ("size", size),
    ("disks", disks),
    ("paper", paper),
    ("peers", peers),
    ("uring", uring),
    ("idle", idle),
    ("fairness", fairness),
    ("cross", cross),
    ("nvme", nvme),
    ("quiet", quiet),
    ("figures", figures),
];

type Measure = fn(&Lab, &mut Section) -> anyhow::Result<()>;

/// Disks of the paper's guest.
const PAPER_DISKS: u64 = 42;
const PAPER_DEPTH: u64 = 32;
/// Over all of them: 4.1 GiB.
const PAPER_DISK_BYTES: u64 = 100 << 20;
const CROWD: u64 = 1000;
/// How long a load runs beside which something else is looked at, and how long it gets to begin.
const HELD_SECONDS: f64 = 8.0;
const HELD_BEFORE: Duration = Duration::from_secs(2);
/// Connecting one disk, at most.
const CONNECT_MAX: Duration = Duration::from_millis(3);

fn depths(lab: &Lab) -> Vec<u64> {
    let all = [1, 2, 4, 8, 16, 32, 64, 128, 256];
    if lab.quick { vec![1, 32, 128] } else { all.to_vec() }
}

/// The two forms of rings, as far as the daemon has them.
fn null_disks(
    daemon: &Ringmilld,
    section: &mut Section,
) -> anyhow::Result<Vec<(&'static str, String, &'static [&'static str])>> {
    let mut disks: Vec<(_, _, &'static [&'static str])> =
        vec![("split", daemon.add_null("split", &Value::Null)?, &[])];
    match daemon.add_null("packed", &json!({"packed_ring": true})) {
        Ok(socket) => disks.push(("packed", socket, &["--packed"])),
        Err(error) => section.notes.push(format!("packed rings are left out: {error:#}")),
    }
    Ok(disks)
}

fn perf_command(args: &str) -> String {
    format!("ringmill-perf --core CLIENT_CORE --ramp 0.2 -t SECONDS {args} SOCKET")
}

/// IOPS and latencies over the queue depth.
fn depth(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let disks = null_disks(&daemon, section)?;
    let peer = StorageDaemon::null(lab)?;
    section.commands = vec![perf_command("-w randread -o 4k -q DEPTH [--packed]"), peer.command()];
    section.commands.push(perf_command("--floor SERVER_CORE -q DEPTH").replace(" SOCKET", ""));
    let floor_core = lab.server_core.to_string();
    let (daemon, peer, floor_core) = (&daemon, &peer, &floor_core);
    let mut points = Vec::new();
    for depth in depths(lab) {
        for (form, socket, args) in &disks {
            points.push(Point::new(*form, depth, Who::Ours, move || {
                let depth = depth.to_string();
                lab.ours(daemon, std::slice::from_ref(socket), &[&["-q", &depth], *args].concat())
            }));
        }
        points.push(Point::new("bare loop, split", depth, Who::Peer, move || {
            let answer = lab.perf(&[], &["--floor", floor_core, "-q", &depth.to_string()])?;
            Ok(figure(&answer, 0))
        }));
        if [1, 8, 32, 128].contains(&depth) {
            points.push(Point::new("qemu-storage-daemon", depth, Who::Peer, move || {
                let answer = lab.perf(&[peer.socket()], &["-q", &depth.to_string()])?;
                Ok(figure(&answer, 0))
            }));
        }
    }
    lab.measure("depth", section, daemon, points)
}

/// IOPS over the size of requests, with and without copying.
fn size(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let null = daemon.add_null("null", &Value::Null)?;
    let ram = daemon.add_malloc("ram", medium::SIZE_BYTES)?;
    daemon.poll(true)?;
    lab.fill(std::slice::from_ref(&ram), medium::SIZE_BYTES)?;
    section.commands = vec![perf_command("-w randread -q 32 -o SIZE")];
    let sizes: &[u64] = if lab.quick {
        &[512, 4096, 131_072]
    } else {
        &[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131_072]
    };
    let daemon = &daemon;
    let mut points = Vec::new();
    for &size in sizes {
        for (series, socket) in [("null", &null), ("RAM disk", &ram)] {
            points.push(Point::new(series, size, Who::Ours, move || {
                lab.ours(
                    daemon,
                    std::slice::from_ref(socket),
                    &["-q", "32", "-o", &size.to_string()],
                )
            }));
        }
    }
    lab.measure("size", section, daemon, points)
}

/// IOPS over the number of disks that one reactor serves.
fn disks(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let crowd = if lab.quick { 200 } else { CROWD };
    let sockets = (0..crowd)
        .map(|number| daemon.add_null(&format!("disk{number}"), &Value::Null))
        .collect::<anyhow::Result<Vec<String>>>()?;
    section.commands = vec![perf_command("-w randread -o 4k -q DEPTH") + " SOCKET..."];
    let (daemon, sockets) = (&daemon, &sockets);
    let mut points = Vec::new();
    for (series, depth, counts) in [
        ("depth 32 each", "32", [1, PAPER_DISKS, crowd]),
        ("depth 1 each", "1", [1, PAPER_DISKS, crowd]),
    ] {
        for count in counts {
            points.push(Point::new(series, count, Who::Ours, move || {
                let loaded = &sockets[..usize::try_from(count)?];
                lab.ours(daemon, loaded, &["-q", depth])
            }));
        }
    }
    lab.measure("disks", section, daemon, points)
}

/// 42 disks of one guest, half reads and half writes: the table of the paper that the project starts from.
fn paper(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let (mut null, mut ram) = (Vec::new(), Vec::new());
    for number in 0..PAPER_DISKS {
        null.push(daemon.add_null(&format!("null{number}"), &Value::Null)?);
        ram.push(daemon.add_malloc(&format!("ram{number}"), PAPER_DISK_BYTES)?);
    }
    daemon.poll(true)?;
    lab.fill(&ram, PAPER_DISK_BYTES)?;
    let copier = Copier::new(PAPER_DISKS * PAPER_DISK_BYTES, PAPER_DISKS * PAPER_DEPTH * 8192)?;
    section.notes.push(format!("bare memcpy in {}", copier.page_text));
    section.commands =
        vec![perf_command("-w randrw -M 50 -q 32 -o SIZE") + " SOCKET... (42 sockets)"];
    let sizes: &[u32] = if lab.quick { &[512, 4096] } else { &[512, 1024, 2048, 4096, 8192] };
    let (daemon, copier) = (&daemon, &copier);
    let mut points = Vec::new();
    for &size in sizes {
        for (series, sockets) in [("null", &null), ("RAM disks", &ram)] {
            points.push(Point::new(series, size.into(), Who::Ours, move || {
                let size = size.to_string();
                lab.ours(daemon, sockets, &["-w", "randrw", "-M", "50", "-q", "32", "-o", &size])
            }));
        }
        points.push(Point::new("memcpy", size.into(), Who::Peer, move || {
            let buffers_count = PAPER_DISKS * PAPER_DEPTH;
            let iops = copier.rate(daemon.core(), size, buffers_count, lab.seconds)?;
            Ok(Figure { iops, ..Figure::default() })
        }));
    }
    lab.measure("paper", section, daemon, points)
}

/// The same `virtio-driver` client on both servers, and a file on tmpfs.
fn peers(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let null = daemon.add_null("null", &Value::Null)?;
    let peer = StorageDaemon::null(lab)?;
    section.commands = vec![peer.command()];
    let (daemon, peer, null) = (&daemon, &peer, &null);
    let mut points = Vec::new();
    for depth in [1, 32, 128] {
        let count = usize::try_from(depth)?;
        points.push(Point::new("qemu-storage-daemon, null", depth, Who::Peer, move || {
            lab.virtio_driver(Path::new(&peer.socket()), count)
        }));
        points.push(Point::new("ringmilld, null", depth, Who::Ours, move || {
            lab.virtio_driver(Path::new(null), count)
        }));
    }
    lab.measure("peers", section, daemon, points)?;
    let Some(Ok(file)) = medium::all(&lab.dir).into_iter().next() else {
        section.notes.push("no file on /dev/shm: left out".into());
        return Ok(());
    };
    let ours = daemon.add_file("tmpfs", file.path())?;
    daemon.poll(true)?;
    lab.fill(std::slice::from_ref(&ours), medium::SIZE_BYTES)?;
    let peer = StorageDaemon::file(lab, file.path())?;
    section.commands.push(peer.command().replace(&file.path().display().to_string(), "FILE"));
    let (peer, ours) = (&peer, &ours);
    let mut points = Vec::new();
    for depth in [1, 32] {
        let count = usize::try_from(depth)?;
        points.push(Point::new("qemu-storage-daemon, tmpfs", depth, Who::Peer, move || {
            lab.virtio_driver(Path::new(&peer.socket()), count)
        }));
        points.push(Point::new("ringmilld, tmpfs", depth, Who::Ours, move || {
            lab.virtio_driver(Path::new(ours), count)
        }));
    }
    lab.measure("peers", section, daemon, points)
}

/// Files and a block device, pinned and not, beside fio on the bare medium.
fn uring(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    section.commands = vec![
        format!("taskset -c SERVER_CORE fio {}", fio_args("FILE", 32, lab.seconds).join(" ")),
        perf_command("-w randread -o 4k -q DEPTH"),
    ];
    for medium in medium::all(&lab.dir) {
        let medium = match medium {
            Ok(medium) => medium,
            Err(reason) => {
                section.notes.push(format!("left out: {reason:#}"));
                continue;
            }
        };
        let (name, path) = (medium.name(), medium.path());
        let socket = daemon.add_file(name, path)?;
        daemon.poll(true)?;
        lab.fill(std::slice::from_ref(&socket), medium::SIZE_BYTES)?;
        let pins = pins(&daemon, name, section)?;
        let now = RefCell::new("");
        let (daemon, socket, now) = (&daemon, &socket, &now);
        let mut points = Vec::new();
        for depth in [1, 32] {
            points.push(Point::new(format!("{name}, fio"), depth, Who::Peer, move || {
                // The image lock does not keep readers such as fio away; both are never busy at the same time.
                fio(lab, path, depth)
            }));
            for &pin in &pins {
                points.push(Point::new(
                    format!("{name}, pin = {pin}"),
                    depth,
                    Who::Ours,
                    move || {
                        if now.replace(pin) != pin {
                            daemon.hide(name)?;
                            daemon.show(name, &json!({"pin": pin}))?;
                        }
                        lab.ours(daemon, std::slice::from_ref(socket), &["-q", &depth.to_string()])
                    },
                ));
            }
        }
        lab.measure(name, section, daemon, points)?;
        daemon.remove_file(name)?;
        if name != "disk" {
            through_ring(lab, section, daemon, name, path)?;
        }
    }
    Ok(())
}

/// Media that are memory, the other way.
fn through_ring(
    lab: &Lab,
    section: &mut Section,
    daemon: &Ringmilld,
    name: &str,
    path: &Path,
) -> anyhow::Result<()> {
    let socket = &daemon.add_file_by(name, path, "ring")?;
    daemon.poll(true)?;
    let mut points = Vec::new();
    for depth in ["1", "32"] {
        points.push(Point::new(
            format!("{name}, transfers = ring"),
            depth.parse()?,
            Who::Ours,
            move || lab.ours(daemon, std::slice::from_ref(socket), &["-q", depth]),
        ));
    }
    lab.measure(name, section, daemon, points)?;
    daemon.remove_file(name)
}

/// The `pin` settings that the daemon takes.
fn pins(
    daemon: &Ringmilld,
    name: &str,
    section: &mut Section,
) -> anyhow::Result<Vec<&'static str>> {
    let mut taken = Vec::new();
    for pin in ["off", "on"] {
        daemon.hide(name)?;
        match daemon.show(name, &json!({"pin": pin})) {
            Ok(()) => taken.push(pin),
            Err(error) => {
                section.notes.push(format!("{name}, pin = {pin} is left out: {error:#}"));
                daemon.show(name, &Value::Null)?;
            }
        }
    }
    Ok(taken)
}

/// A busy disk alone and among a thousand idle ones, and what those cost.
fn idle(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let crowd = if lab.quick { 200 } else { CROWD };
    let daemon = Ringmilld::start(lab)?;
    let busy = daemon.add_null("busy", &Value::Null)?;
    daemon.poll(true)?;
    lab.perf(std::slice::from_ref(&busy), &[])?;
    let before = daemon.private_bytes()?;
    let idle = (0..crowd)
        .map(|number| daemon.add_null(&format!("idle{number}"), &Value::Null))
        .collect::<anyhow::Result<Vec<String>>>()?;
    let mut among: Vec<String> = idle.iter().map(|socket| format!("{socket},idle")).collect();
    among.push(busy.clone());
    section.commands = vec![perf_command("-q 32") + " [SOCKET,idle]..."];
    let (daemon_ref, among_ref, alone) = (&daemon, &among, &[busy]);
    let mut points = Vec::new();
    for depth in ["1", "32", "128"] {
        let x = depth.parse()?;
        points.push(Point::new("alone", x, Who::Ours, move || {
            lab.ours(daemon_ref, alone, &["-q", depth])
        }));
        points.push(Point::new("among idle disks", x, Who::Ours, move || {
            lab.ours(daemon_ref, among_ref, &["-q", depth])
        }));
    }
    lab.measure("idle", section, &daemon, points)?;
    let (after, _) = held(lab, &among, || daemon.private_bytes())?;
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let each = after.saturating_sub(before) as f64 / crowd as f64;
    let rounds = vec![Figure { other: each, ..Figure::default() }];
    section.rows.push(Row { series: "private bytes per idle disk".into(), x: crowd, rounds });
    daemon.stop()
}

/// Does something while a load is on these targets; its result, and the load's report.
fn held<T>(
    lab: &Lab,
    targets: &[String],
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(T, Value)> {
    std::thread::scope(|scope| {
        let load = scope.spawn(|| lab.perf_for(lab.seconds + HELD_SECONDS, targets, &["-q", "32"]));
        // Connected and past its ramp by then; the load goes on for longer than what is done beside it.
        std::thread::sleep(HELD_BEFORE + CONNECT_MAX * u32::try_from(targets.len())?);
        let result = work();
        let report = load.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))??;
        Ok((result?, report))
    })
}

/// One request at a time beside a thousand large ones, on one reactor.
fn fairness(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let file = medium::all(&lab.dir).into_iter().next().context("there is one")??;
    let mut media = Vec::new();
    for (name, small, bulk) in [
        (
            "null",
            daemon.add_null("null-small", &Value::Null)?,
            daemon.add_null("null-bulk", &Value::Null)?,
        ),
        (
            "RAM disks",
            daemon.add_malloc("ram-small", medium::SIZE_BYTES)?,
            daemon.add_malloc("ram-bulk", medium::SIZE_BYTES)?,
        ),
        (
            "RAM disk beside tmpfs",
            daemon.add_malloc("ram2-small", medium::SIZE_BYTES)?,
            daemon.add_file("tmpfs-bulk", file.path())?,
        ),
    ] {
        daemon.poll(true)?;
        if name != "null" {
            lab.fill(&[small.clone(), bulk.clone()], medium::SIZE_BYTES)?;
        }
        media.push((name, small, bulk));
    }
    section.commands = vec![perf_command("SMALL,o=4k,q=1").replace(" SOCKET", " BULK,o=1m,q=1024")];
    let daemon = &daemon;
    let mut points = Vec::new();
    for (name, small, bulk) in &media {
        points.push(Point::new(format!("{name}, alone"), 1, Who::Ours, move || {
            lab.ours(daemon, std::slice::from_ref(small), &["-q", "1"])
        }));
        points.push(Point::new(format!("{name}, beside"), 1, Who::Ours, move || {
            let targets = [format!("{small},o=4k,q=1"), format!("{bulk},o=1m,q=1024")];
            let answer = lab.perf(&targets, &[])?;
            let bulk = figure(&answer, 1);
            // What the neighbour gets meanwhile, bytes per second.
            Ok(Figure { other: bulk.iops * 1_048_576.0, ..figure(&answer, 0) })
        }));
    }
    lab.measure("fairness", section, daemon, points)
}

/// What it costs when a bdev's only queue belongs to another core.
fn cross(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let owner = lab.server_core.to_string();
    let command = "ringmill-perf --core CLIENT_CORE --bdev null -q DEPTH [--owner SERVER_CORE]";
    section.commands = vec![command.to_owned()];
    let there = ["--bdev", "null", "--owner", &owner];
    let crosses = match lab.perf_for(0.1, &[], &there) {
        Ok(_) => true,
        Err(error) => {
            section.notes.push(format!("the other core is left out: {error:#}"));
            false
        }
    };
    let mut points = Vec::new();
    for depth in ["1", "32", "128"] {
        let x = depth.parse()?;
        let here = &there[..2];
        points.push(Point::new("on the same core", x, Who::Peer, move || {
            Ok(figure(&lab.perf(&[], &[here, &["-q", depth]].concat())?, 0))
        }));
        if crosses {
            points.push(Point::new("to the other core", x, Who::Peer, move || {
                Ok(figure(&lab.perf(&[], &[&there[..], &["-q", depth]].concat())?, 0))
            }));
        }
    }
    lab.measure("cross", section, &daemon, points)
}

/// The NVMe driver on the device model, a process of its own on the other core, with a null medium behind it.
fn nvme(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let model = NvmeModel::start(lab)?;
    let command =
        "ringmill-perf --core CLIENT_CORE --bdev null|nvme:SOCKET -w randread -o 4k -q DEPTH";
    section.commands = vec![command.to_owned(), model.command(), NvmeModel::CEILING.to_owned()];
    let bdev = format!("nvme:{}", model.socket());
    let (model, bdev) = (&model, &bdev);
    let mut points = Vec::new();
    for depth in ["1", "32", "128"] {
        let x = depth.parse()?;
        for (series, bdev) in [("NVMe driver", bdev.as_str()), ("null bdev, no device", "null")] {
            points.push(Point::new(series, x, Who::Peer, move || {
                let found = figure(&lab.perf(&[], &["--bdev", bdev, "-q", depth])?, 0);
                #[expect(clippy::cast_precision_loss, reason = "figures for people")]
                let cycles = tick_rate() as f64 / found.iops;
                Ok(Figure { cycles, ..found })
            }));
        }
        points.push(Point::new("bare loop on the model", x, Who::Peer, move || {
            model.ceiling(lab, x)
        }));
    }
    lab.measure("nvme", section, &daemon, points)
}

/// System calls of the reactor's thread while a polling client keeps it busy.
fn quiet(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let sockets =
        [daemon.add_null("null", &Value::Null)?, daemon.add_malloc("ram", medium::SIZE_BYTES)?];
    daemon.poll(true)?;
    lab.fill(&sockets[1..], medium::SIZE_BYTES)?;
    let tid = daemon.reactor()?["tid"].as_u64().context("the reactor has no thread id")?;
    section.commands = vec![format!("timeout -s INT 1 strace -qq -c -p {}", "REACTOR_TID")];
    section.rounds = 1;
    section.seconds = 1.0;
    for (name, socket) in ["null", "RAM disk"].iter().zip(&sockets) {
        for depth in [32, 128] {
            let target = [format!("{socket},q={depth}")];
            let (calls, report) = held(lab, &target, || system_calls(tid))?;
            #[expect(clippy::cast_precision_loss, reason = "figures for people")]
            let rounds = vec![Figure { other: calls as f64, ..figure(&report, 0) }];
            section.rows.push(Row { series: (*name).to_owned(), x: depth, rounds });
        }
    }
    daemon.stop()
}

/// A null disk whose counters and histograms are recorded, and not.
fn figures(lab: &Lab, section: &mut Section) -> anyhow::Result<()> {
    let daemon = Ringmilld::start(lab)?;
    let disk = daemon.add_null("disk", &Value::Null)?;
    section.commands = vec![
        "ringmillctl call latency_set_recording enable=false".to_owned(),
        perf_command("-w randread -o 4k -q DEPTH"),
    ];
    let (daemon, disk) = (&daemon, std::slice::from_ref(&disk));
    let mut points = Vec::new();
    for depth in ["1", "32", "128"] {
        let x = depth.parse()?;
        for (series, enable) in [("recorded", true), ("not recorded", false)] {
            points.push(Point::new(series, x, Who::Ours, move || {
                daemon.call("latency_set_recording", json!({"enable": enable}))?;
                lab.ours(daemon, disk, &["-q", depth])
            }));
        }
    }
    lab.measure("figures", section, daemon, points)
}

/// System calls of a thread within a second, mutexes' included.
fn system_calls(tid: u64) -> anyhow::Result<u64> {
    let output = Command::new("timeout")
        .args(["-s", "INT", "1", "strace", "-qq", "-c", "-p", &tid.to_string()])
        .output()
        .context("cannot start strace")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("attach:") || text.contains("failed to run") {
        bail!("strace: {}", text.trim());
    }
    // Nothing is printed when nothing was called.
    let total = text.lines().find(|line| line.trim_end().ends_with("total"));
    let calls = total.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    Ok(calls.unwrap_or(0))
}
