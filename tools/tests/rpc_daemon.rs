//! Runs the independent script `rpc_daemon.py` against a daemon that serves a client meanwhile.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use daemon::Daemon;
use media::{MIB, skip};
use model::{Exercise, connect, seed};

#[test]
fn every_method_and_every_documented_error_as_a_strangers_script_sees_them() {
    let mut daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", 4 * MIB, 512);
    let stop = AtomicBool::new(false);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rpc_daemon.py");
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut exercise = Exercise::new(connect(&socket, 2, 4, 65536), 4, seed(0x59c));
            while !stop.load(Ordering::Relaxed) {
                exercise.random_rounds(8, 4096, 64);
                std::thread::sleep(Duration::from_millis(2));
            }
            exercise.verify();
        });
        let output = Command::new("python3")
            .arg(&script)
            .args([daemon.rpc_socket.as_path(), daemon.dir()])
            .args(["ram", "ram"])
            .output();
        stop.store(true, Ordering::Relaxed);
        output
    });
    let output = match output {
        Ok(output) => output,
        Err(error) => return skip("the RPC script", &format!("cannot start python3: {error}")),
    };
    let (said, failed) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{failed}");
    eprint!("{said}");
    assert!(daemon.is_alive());
    daemon.stop();
}
