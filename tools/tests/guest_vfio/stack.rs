//! The daemon in a guest, on NVMe controllers that vfio-pci has, with clients in the same guest.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ringmill_tools::guest_lab::initramfs::Payload;
use ringmill_tools::guest_lab::qemu::{MachineConfig, NamespaceConfig, NvmeConfig};
use ringmill_tools::guest_lab::{Lab, LabError, ScratchDir, packages};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::lab::{MIB, Outcome, image, with_lab};
use super::{Digest, FIRST, Lent, TEST_WAIT_MAX, machine, one_disk};

/// What the checked loads use of a disk, in MiB.
const SPAN_MIB: u64 = 16;

/// Seconds of a measured load.
const MEASURED_S: u32 = 4;

const DAEMON: &str = env!("CARGO_BIN_EXE_ringmilld");
const PERF: &str = env!("CARGO_BIN_EXE_ringmill-perf");

/// A guest with daemon and clients on board.
struct Stack {
    lent: Lent,
    /// Words for the daemon.
    words: &'static str,
}

impl Stack {
    fn boot(
        lab: &mut Lab,
        scratch: &ScratchDir,
        machine: MachineConfig,
        words: &'static str,
    ) -> Result<Stack, LabError> {
        let machine = MachineConfig { memory_mib: 1024, ..machine };
        let more = [Path::new(DAEMON), Path::new(PERF)];
        let lent = Lent::boot_with(lab, scratch, machine, Payload::Fio, &more)?;
        Ok(Stack { lent, words })
    }

    fn sh(&mut self, script: &str) -> Result<String, LabError> {
        self.lent.guest.sh_within(script, TEST_WAIT_MAX)
    }

    /// A program of ours by its place in the guest.
    fn program(&self, name: &str) -> String {
        self.lent.ctl.with_file_name(name).display().to_string()
    }

    fn ctl(&mut self, words: &str) -> Result<String, LabError> {
        let ctl = self.program("ringmillctl");
        self.sh(&format!("{ctl} {words}"))
    }

    fn call(&mut self, words: &str) -> Result<Value, LabError> {
        let said = self.ctl(&format!("call {words}"))?;
        Ok(serde_json::from_str(&said).unwrap_or_else(|error| panic!("{words}: {error}: {said}")))
    }

    /// Starts the daemon; the disk `last` is there afterwards.
    fn serve(&mut self, config: &str, last: &str) -> Outcome {
        let (daemon, words) = (self.program("ringmilld"), self.words);
        let script = format!(
            "cat >/run/ringmill.toml <<'END'\n{config}\nEND\nmkdir -p /run/ringmill\n\
             {daemon} -c /run/ringmill.toml -S /run/ringmill {words} >/run/daemon.log 2>&1 &\n\
             echo $! >/run/daemon.pid\n\
             for i in $(seq 600); do [ -S /run/ringmill/{last} ] && exit 0; [ -e /proc/$!/exe ] || break; sleep 0.1; done\n\
             cat /run/daemon.log; exit 1"
        );
        self.sh(&script).map(drop)
    }

    fn stop(&mut self) -> Outcome {
        // Its entry stays until the guest's init looks; the program behind it is gone at once.
        let script = "pid=$(cat /run/daemon.pid); kill $pid\n\
                      for i in $(seq 600); do [ -e /proc/$pid/exe ] || exit 0; sleep 0.1; done\n\
                      cat /run/daemon.log; exit 1";
        self.sh(script).map(drop)
    }

    /// Runs one of `inside`'s tests on a disk.
    fn inside(&mut self, name: &str, disk: &str, more: &str) -> Result<String, LabError> {
        let program = self.lent.program.display().to_string();
        self.sh(&format!(
            "{} || {{ cat /run/{name}; tail -20 /run/daemon.log; dmesg | tail; exit 1; }}\ncat /run/{name}",
            Self::inside_words(&program, name, disk, more)
        ))
    }

    fn inside_words(program: &str, name: &str, disk: &str, more: &str) -> String {
        format!(
            "RUST_BACKTRACE=0 RINGMILL_SOCKET=/run/ringmill/{disk} {more} {program} --ignored --exact inside::{name} \
             --nocapture --test-threads=1 >/run/{name} 2>&1"
        )
    }

    /// A load of ringmill-perf; its figures, on one line: a hundred short ones have jammed the serial port.
    fn perf(&mut self, words: &str) -> Result<Value, LabError> {
        let perf = self.program("ringmill-perf");
        let said = self.sh(&format!(
            "{perf} --json --timeout 120 {words} >/run/perf 2>/run/perf.err || {{ cat /run/perf /run/perf.err; tail -20 /run/daemon.log; exit 1; }}\n\
             tr -d ' \\n' </run/perf"
        ))?;
        Ok(serde_json::from_str(&said).unwrap_or_else(|error| panic!("{words}: {error}: {said}")))
    }

    /// Gives the controller back to the kernel, whose disk is there afterwards.
    fn unbind(&mut self) -> Outcome {
        self.ctl(&format!("pci unbind {FIRST}"))?;
        self.sh("for i in $(seq 300); do [ -b /dev/nvme0n1 ] && exit 0; sleep 0.1; done; dmesg | tail; exit 1")
            .map(drop)
    }

    fn digest(&mut self, disk: &str) -> Result<String, LabError> {
        let said = self.inside("digest", disk, &format!("RINGMILL_SPAN={SPAN_MIB}"))?;
        // The test's own name comes before it on the same line.
        let line = said.lines().find_map(|line| line.rsplit_once("... digest "));
        Ok(line.unwrap_or_else(|| panic!("no digest in {said}")).1.to_owned())
    }

    fn random_reads_of_the_kernel(&mut self) -> Result<f64, LabError> {
        let said = self.sh(&format!(
            "fio --name=r --filename=/dev/nvme0n1 --ioengine=io_uring --direct=1 --iodepth=32 --rw=randread --bs=4k \
             --size={SPAN_MIB}m --time_based --runtime={MEASURED_S} --output-format=terse --terse-version=3"
        ))?;
        let line = said.lines().find(|line| line.starts_with("3;")).expect("figures");
        Ok(line.split(';').nth(7).and_then(|field| field.parse().ok()).expect("IOPS"))
    }

    fn random_reads_of_ours(&mut self) -> Result<f64, LabError> {
        let figures = self.perf(&format!(
            "--bdev nvme:{FIRST} -q 32 -o 4k -w randread --span {SPAN_MIB}m -t {MEASURED_S}"
        ))?;
        Ok(figures["jobs"][0]["read"]["iops"].as_f64().unwrap_or_else(|| panic!("{figures}")))
    }
}

/// The same checksum as `inside::digest` has, of the image itself.
fn digest_of(path: &Path) -> Result<String, LabError> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).expect("the image");
    file.take(SPAN_MIB * MIB).read_to_end(&mut bytes).expect("the image");
    let mut digest = Digest::default();
    bytes
        .chunks_exact(8)
        .for_each(|word| digest.add(u64::from_le_bytes(word.try_into().expect("8"))));
    Ok(format!("{:016x}", digest.0))
}

/// Commands that QEMU's controller got, by a part of their name.
fn traced(trace: &Path, name: &str) -> usize {
    let text = fs::read(trace).expect("a trace");
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().filter(|line| line.contains("pci_nvme_io_cmd ") && line.contains(name)).count()
}

/// Data that one side wrote is what the other side reads.
fn to_the_kernel_and_back(stack: &mut Stack, config: &str, disk: &Path) -> Outcome {
    stack.ctl("nvme detach N")?;
    stack.stop()?;
    stack.unbind()?;
    let checked = format!("-w verify -o 4k -q 32 --span {SPAN_MIB}m --seed");
    stack.perf(&format!("--bdev file:/dev/nvme0n1 {checked} 7 --pass check"))?;

    stack.sh(&format!(
        "fio --name=w --filename=/dev/nvme0n1 --ioengine=io_uring --direct=1 --iodepth=16 --rw=randwrite --bs=4k \
         --size={SPAN_MIB}m --verify=crc32c --do_verify=1 --end_fsync=1 --output-format=terse >/run/fio"
    ))?;
    stack.lent.bind(FIRST)?;
    stack.serve(config, "vm")?;
    let (ours, theirs) = (stack.digest("vm")?, digest_of(disk)?);
    assert_eq!(ours, theirs, "read over VFIO and from the image");
    stack.stop()
}

#[test]
fn the_whole_stack_runs_in_a_guest_and_shares_its_disk_with_the_kernel() -> Outcome {
    with_lab("NVMe over VFIO, the whole stack", |lab| {
        let scratch = ScratchDir::new()?;
        let disk = image(&scratch, "nvme.img", 64 * MIB)?;
        let mut nvme = one_disk(&disk);
        nvme.namespaces[0].drive += ",discard=unmap";
        let trace = scratch.path().join("trace");
        let machine = MachineConfig {
            trace: Some(("pci_nvme_io_cmd".to_owned(), trace.clone())),
            ..machine(vec![nvme])
        };
        let mut stack = Stack::boot(lab, &scratch, machine, "-m 0x2")?;
        let config = format!(
            "[[nvme]]\nname = \"N\"\naddress = \"{FIRST}\"\n[[disk]]\nname = \"vm\"\nbdev = \"Nn1\""
        );
        stack.lent.bind(FIRST)?;
        stack.serve(&config, "vm")?;
        let before = ["WRITE'", "READ'"].map(|name| traced(&trace, name));
        let checked = format!("/run/ringmill/vm -w verify -o 4k -q 32 --span {SPAN_MIB}m --seed 7");
        let figures = stack.perf(&format!("{checked} -t 3"))?;
        eprintln!("verify: {} reads/s", figures["jobs"][0]["read"]["iops"]);
        stack.perf(&format!("{checked} --pass fill"))?;
        stack.inside("ranges", "vm", "")?;
        for (name, before) in ["WRITE'", "READ'"].into_iter().zip(before) {
            assert!(traced(&trace, name) > before + 1000, "{name}");
        }
        for name in ["FLUSH", "DSM", "WRITE_ZEROES"] {
            let count = traced(&trace, name);
            eprintln!("{name}: {count}");
            assert!(count >= 1, "no {name} reached the controller");
        }
        let reactors = stack.call("framework_get_reactors")?;
        assert_eq!(reactors["reactors"][0]["bounces"], json!(0), "{reactors}");
        let histograms = stack.call("latency_get_histograms")?;
        for entry in histograms["histograms"].as_array().expect("histograms") {
            if entry["count"].as_u64() > Some(0) {
                let field = |name: &str| entry[name].to_string();
                eprintln!(
                    "{} {}: {} requests, p50 {} ns, p99 {} ns",
                    field("op"),
                    field("stage"),
                    field("count"),
                    field("p50"),
                    field("p99")
                );
            }
        }
        to_the_kernel_and_back(&mut stack, &config, &disk)?;

        // How fast, printed for people: a busy machine must not fail this.
        let (mut ours, mut theirs) = (0.0, 0.0);
        for _ in 0..2 {
            ours += stack.random_reads_of_ours()?;
            stack.unbind()?;
            theirs += stack.random_reads_of_the_kernel()?;
            stack.lent.bind(FIRST)?;
        }
        let ratio = ours / theirs;
        eprintln!(
            "QD32 4 KiB random reads: ours {:.0}, the kernel's {:.0}, {ratio:.2}",
            ours / 2.0,
            theirs / 2.0
        );
        assert!(ratio > 0.5, "{ratio}");
        stack.lent.guest.quit()
    })
}

/// A server of an image that can be stopped.
struct Nbd(Child);

impl Nbd {
    fn start(socket: &Path, image: &Path) -> Result<Nbd, LabError> {
        let program = packages::find("qemu-nbd")
            .ok_or_else(|| LabError::Packages { list: "qemu-utils (for qemu-nbd)".to_owned() })?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["--format=raw", "--persistent", "--shared=4", "-k"])
            .args([socket, image])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd starts");
        let end = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(Instant::now() < end, "qemu-nbd has no socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Nbd(child))
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, signal).expect("a signal");
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client that goes on in the guest while the lab does something to its disk.
fn begin(stack: &mut Stack, name: &str, disk: &str) -> Outcome {
    let program = stack.lent.program.display().to_string();
    let words = Stack::inside_words(&program, name, disk, "");
    stack.sh(&format!("( {words}; echo $? >/run/{name}.code ) >/dev/null 2>&1 &")).map(drop)
}

/// Its end.
fn end(stack: &mut Stack, name: &str) -> Result<String, LabError> {
    stack.sh(&format!(
        "for i in $(seq 1200); do [ -s /run/{name}.code ] && break; sleep 0.1; done\n\
         [ \"$(cat /run/{name}.code)\" = 0 ] || {{ cat /run/{name}; tail -20 /run/daemon.log; dmesg | tail; exit 1; }}\n\
         cat /run/{name}"
    ))
}

/// The device behind the port is taken away in the middle of a load, and comes back.
fn plugged_out_and_in(stack: &mut Stack, image: &Path) -> Outcome {
    begin(stack, "until_lost", "hot")?;
    let perf = stack.program("ringmill-perf");
    stack.sh(&format!(
        "( {perf} /run/ringmill/ram -w verify -o 4k -q 8 --span 4m -t 20 --timeout 10 >/run/ram 2>&1; echo $? >/run/ram.code ) \
         >/dev/null 2>&1 &\n\
         for i in $(seq 600); do grep -q loaded /run/until_lost && exit 0; sleep 0.1; done; cat /run/until_lost; exit 1"
    ))?;
    stack.lent.guest.qmp().execute("device_del", &json!({ "id": "nvme3" }))?;
    let started = Instant::now();
    let said = end(stack, "until_lost")?;
    let lost = said
        .lines()
        .find_map(|line| line.split_once("lost after "))
        .unwrap_or_else(|| panic!("{said}"));
    eprintln!("device_del, {:?} later: after {}", started.elapsed(), lost.1);
    let away = format!(
        "for i in $(seq 600); do [ -e /sys/bus/pci/devices/{HOT} ] || exit 0; sleep 0.1; done; tail /run/daemon.log; dmesg | tail; exit 1"
    );
    stack.sh(&away)?;
    let bdevs = stack.call("bdev_get_bdevs")?.to_string();
    assert!(!bdevs.contains("Hotn1") && bdevs.contains("\"ram\""), "{bdevs}");
    let said = stack.sh(
        "for i in $(seq 1200); do [ -s /run/ram.code ] && break; sleep 0.1; done; cat /run/ram; [ \"$(cat /run/ram.code)\" = 0 ]",
    )?;
    eprintln!("the neighbour meanwhile: {}", said.lines().next().unwrap_or_default());

    let qmp = stack.lent.guest.qmp();
    qmp.execute(
        "blockdev-add",
        &json!({
            "driver": "raw", "node-name": "again",
            "file": { "driver": "file", "filename": image, "locking": "off" },
        }),
    )?;
    qmp.execute(
        "device_add",
        &json!({ "driver": "nvme", "id": "again", "serial": "again", "bus": "port0", "drive": "again" }),
    )?;
    stack.sh(&format!(
        "for i in $(seq 600); do [ -e /sys/bus/pci/devices/{HOT}/driver ] && exit 0; sleep 0.1; done; dmesg | tail; exit 1"
    ))?;
    stack.ctl("call vhost_delete_controller ctrlr=hot")?;
    stack.lent.bind(HOT)?;
    stack.ctl(&format!("nvme attach Hot --pci {HOT}"))?;
    stack.ctl("disk add hot --bdev Hotn1")?;
    stack.perf("/run/ringmill/hot -w verify -o 4k -q 16 --span 4m -t 1").map(drop)
}

/// How long a disk's data are out of reach.
const OUTAGE: Duration = Duration::from_secs(8);

/// A checked load goes on while the data of its disk are out of reach, and after it; so does one of another disk of the
/// same reactor, whose longest request this returns.
fn out_of_reach(
    stack: &mut Stack,
    (name, disk): (&str, &str),
    mut set_reach: impl FnMut(&mut Stack, bool) -> Outcome,
) -> Result<Duration, LabError> {
    let perf = stack.program("ringmill-perf");
    let load = |disk: &str, more: &str| {
        format!(
            "rm -f /run/{disk}.code; ( {perf} --json /run/ringmill/{disk} -w verify -o 4k --span 2m {more} >/run/{disk} 2>&1; \
             echo $? >/run/{disk}.code ) >/dev/null 2>&1 &\n"
        )
    };
    stack.sh(&format!("{}sleep 5", load(disk, "-q 8 -t 25 --timeout 120")))?;
    stack.sh(&load("ram", "-q 2 -t 12 --timeout 60"))?;
    set_reach(stack, false)?;
    std::thread::sleep(OUTAGE);
    set_reach(stack, true)?;
    let mut report = |disk: &str| {
        let said = stack.sh(&format!(
            "for i in $(seq 1800); do [ -s /run/{disk}.code ] && break; sleep 0.1; done\n\
             [ \"$(cat /run/{disk}.code)\" = 0 ] || {{ cat /run/{disk}; tail -30 /run/daemon.log; exit 1; }}\n\
             tr -d ' \\n' </run/{disk}",
        ))?;
        Ok(serde_json::from_str::<Value>(&said).unwrap_or_else(|error| panic!("{error}: {said}")))
    };
    let longest = |figures: Value| {
        let longest_ns = figures["jobs"][0]["read"]["lat_ns"]["max"].as_u64();
        Duration::from_nanos(longest_ns.unwrap_or_else(|| panic!("{figures}")))
    };
    let own = longest(report(disk)?);
    let neighbour = longest(report("ram")?);
    eprintln!("{name}: longest request {own:?}, its neighbour's {neighbour:?}");
    let shown = stack.call(&format!("bdev_nvme_get_controllers name={name}"))?;
    let counters = &shown[0]["ctrlrs"][0]["counters"];
    eprintln!("{counters}");
    assert!(counters["timeouts"].as_u64() >= Some(1) && own > OUTAGE / 4, "{counters}");
    stack.perf(&format!("/run/ringmill/{disk} -w verify -o 4k -q 8 --span 2m -t 1"))?;
    Ok(neighbour)
}

/// The server of the data stops and goes on.
fn stopped_and_continued(stack: &mut Stack, nbd: &Nbd) -> Outcome {
    // QEMU waits for the server, too, and lets its guest wait, as soon as the controller is reset: no word on neighbours.
    out_of_reach(stack, ("Slow", "slow"), |_, is_reachable| {
        nbd.signal(if is_reachable { Signal::CONT } else { Signal::STOP });
        Ok(())
    })
    .map(drop)
}

/// What the disk's data may cost is limited: first so that it is only slow, then so that the driver cannot wait for it.
fn throttled(stack: &mut Stack) -> Outcome {
    stack.perf("/run/ringmill/narrow -w verify -o 4k -q 8 --span 1m -t 2")?;
    let shown = stack.call("bdev_nvme_get_controllers name=Narrow")?;
    let counters = &shown[0]["ctrlrs"][0]["counters"];
    assert_eq!((&counters["timeouts"], &counters["resets"]), (&json!(0), &json!(0)), "{counters}");
    let neighbour = out_of_reach(stack, ("Narrow", "narrow"), |stack, is_reachable| {
        let iops = if is_reachable { 0 } else { 1 };
        let limits = json!({
            "id": "narrow", "iops": iops, "iops_rd": 0, "iops_wr": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0,
        });
        stack.lent.guest.qmp().execute("block_set_io_throttle", &limits).map(drop)
    })?;
    assert!(neighbour < OUTAGE / 4, "{neighbour:?}");
    Ok(())
}

/// Behind the port that devices are plugged into.
const HOT: &str = "0000:01:00.0";

#[test]
fn lost_broken_stopped_and_throttled_devices_hurt_only_their_own_requests() -> Outcome {
    with_lab("NVMe over VFIO, faults", |lab| {
        let scratch = ScratchDir::new()?;
        let path = |name: &str| image(&scratch, name, 64 * MIB);
        let (broken, slow, hot) = (path("broken.img")?, path("slow.img")?, path("hot.img")?);
        let mut narrow = one_disk(&path("narrow.img")?);
        narrow.namespaces[0].drive += ",throttling.iops-total=200";
        narrow.namespaces[0].properties = ",id=narrow".to_owned();
        let nbd_socket = scratch.path().join("nbd");
        let nbd = Nbd::start(&nbd_socket, &slow)?;
        let drive = |drive: String| NamespaceConfig { drive, properties: String::new() };
        let broken = drive(format!(
            "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
             file.inject-error.0.event=none,file.inject-error.0.sector=2048,file.inject-error.0.errno=5",
            broken.display()
        ));
        let slow = drive(format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={}",
            nbd_socket.display()
        ));
        let alone = |namespace| NvmeConfig { namespaces: vec![namespace], ..NvmeConfig::default() };
        let plugged = NvmeConfig { place: Some("bus=port0".to_owned()), ..one_disk(&hot) };
        let machine = MachineConfig {
            devices: vec!["pcie-root-port,id=port0,chassis=1,slot=1,addr=0x8".to_owned()],
            ..machine(vec![alone(broken), alone(slow), narrow, plugged])
        };
        let mut stack = Stack::boot(lab, &scratch, machine, "-m 0x2 --idle adaptive")?;
        for address in [FIRST, SECOND, THIRD, HOT] {
            stack.lent.bind(address)?;
        }
        let mut config = String::new();
        for (name, address, disk) in [
            ("Broken", FIRST, "broken"),
            ("Slow", SECOND, "slow"),
            ("Narrow", THIRD, "narrow"),
            ("Hot", HOT, "hot"),
        ] {
            config += &format!(
                "[[nvme]]\nname = \"{name}\"\naddress = \"{address}\"\n\
                 timeout_ms = {}\n[[disk]]\nname = \"{disk}\"\nbdev = \"{name}n1\"\n",
                if ["Slow", "Narrow"].contains(&name) { 2000 } else { 30000 }
            );
        }
        config += "[[disk]]\nname = \"ram\"\nbackend = \"malloc\"\nsize = \"16M\"\n";
        stack.serve(&config, "ram")?;

        eprintln!("{}", stack.inside("bad_sector", "broken", "")?);
        plugged_out_and_in(&mut stack, &hot)?;
        stopped_and_continued(&mut stack, &nbd)?;
        throttled(&mut stack)?;
        stack.stop()?;
        stack.lent.guest.quit()
    })
}

/// Where QEMU puts the next controllers.
const SECOND: &str = "0000:00:11.0";
const THIRD: &str = "0000:00:12.0";
