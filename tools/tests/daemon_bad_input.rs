//! Bad input for `ringmilld`: each mistake is one line that says what to do, an exit code other than 0, nothing left
//! behind; and rubbish on the RPC socket leaves everyone else served.

#[path = "support/daemon.rs"]
mod daemon;
#[path = "support/media.rs"]
mod media;
#[path = "support/model.rs"]
mod model;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{Daemon, RINGMILLD, WAIT_MAX, wait_for};
use media::{MIB, is_root, set_len, skip};
use model::{Exercise, connect};
use serde_json::json;
use tempfile::TempDir;

const NOBODY: &str = "65534";

/// What a start that must fail left of itself.
struct Refusal {
    code: Option<i32>,
    stderr: String,
}

/// Starts the daemon and waits for its end; a daemon that stays up is killed and reported.
fn refused(dir: &Path, through: &[&str], program: &str, args: &[&str]) -> Refusal {
    let mut words = through.to_vec();
    words.push(program);
    let sockets = dir.join("s");
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .arg("-S")
        .arg(&sockets)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ringmilld starts");
    let mut status = None;
    wait_for(WAIT_MAX, || {
        status = child.try_wait().expect("our child");
        status.is_some()
    });
    let _ = child.kill();
    let mut stderr = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut stderr).expect("text");
    let _ = child.wait();
    let left: Vec<_> = fs::read_dir(&sockets)
        .map(|entries| entries.flatten().map(|e| e.file_name()).collect())
        .unwrap_or_default();
    // A lock file may stay: removing it would let two daemons in.
    let left: Vec<_> =
        left.into_iter().filter(|name| !name.to_string_lossy().ends_with(".lock")).collect();
    assert!(left.is_empty(), "{args:?} left {left:?} behind");
    let code = status.unwrap_or_else(|| panic!("{args:?} was accepted: {stderr}")).code();
    Refusal { code, stderr }
}

/// The refusal must be one line that contains all of `words`.
fn expect(refusal: &Refusal, what: &str, words: &[&str]) {
    let Refusal { code, stderr } = refusal;
    assert!(matches!(code, Some(1 | 2)), "{what}: exit {code:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{what}: not one line: {stderr}");
    assert!(stderr.starts_with("ringmilld: "), "{what}: {stderr}");
    let said_twice = stderr.matches("(os error").count() > 1;
    assert!(!said_twice, "{what}: says it twice: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{what}: {word:?} is missing in: {stderr}");
    }
    eprintln!("{what}: {}", stderr.trim_end());
}

fn refuse_config(what: &str, name: &str, text: &str, words: &[&str]) {
    let dir = TempDir::new().expect("a temporary directory");
    let path = dir.path().join(name);
    let text = text.replace("DIR", dir.path().to_str().expect("UTF-8"));
    set_len(&dir.path().join("good.img"), MIB);
    set_len(&dir.path().join("odd.img"), MIB + 100);
    set_len(&dir.path().join("empty.img"), 0);
    fs::create_dir(dir.path().join("folder")).expect("ours");
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(usize::try_from(MIB).unwrap(), 0);
    fs::write(dir.path().join("image.qcow2"), qcow2).expect("ours");
    fs::write(&path, text).expect("ours");
    let args = ["-m", "1", "-c", path.to_str().expect("UTF-8")];
    expect(&refused(dir.path(), &[], RINGMILLD, &args), what, words);
}

#[test]
fn mistakes_in_a_toml_configuration_are_one_line_with_the_place_and_the_way_out() {
    let cases: &[(&str, &str, &[&str])] = &[
        ("unknown key", "[daemon]\ncors = \"1\"\n", &["c.toml:2", "cors", "cores"]),
        ("unknown table", "[dameon]\n", &["c.toml:1", "dameon", "daemon"]),
        (
            "unknown key of a disk",
            "[[disk]]\nname = \"a\"\nfile = \"x\"\n",
            &["c.toml:3", "file", "path"],
        ),
        ("wrong type", "[[disk]]\nname = 7\npath = \"x\"\n", &["c.toml:2", "name"]),
        ("wrong type of a table", "disk = \"x\"\n", &["c.toml:1", "[[disk]]"]),
        ("bad TOML", "[daemon\n", &["c.toml:1"]),
        ("no name", "[[disk]]\npath = \"x\"\n", &["c.toml:1", "name"]),
        ("no size", "[[disk]]\nname = \"a\"\nbackend = \"malloc\"\n", &["c.toml", "size", "1GiB"]),
        (
            "odd size",
            "[[disk]]\nname = \"a\"\nbackend = \"malloc\"\nsize = 1000\n",
            &["c.toml:4", "1000", "512"],
        ),
        (
            "unknown backend",
            "[[disk]]\nname = \"a\"\nbackend = \"malok\"\nsize = 512\n",
            &["c.toml:3", "malok", "malloc"],
        ),
        (
            "same name twice",
            "[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = 512\n[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = 512\n",
            &["c.toml:6", "rename"],
        ),
        ("cores that are no cores", "[daemon]\ncores = \"all\"\n", &["c.toml:2", "all", "0x"]),
        (
            "a cpumask outside the daemon's cores",
            "[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = 512\ncpumask = \"[1]\"\n",
            &["c.toml:1", "0x2"],
        ),
        (
            "missing image",
            "[[disk]]\nname = \"a\"\npath = \"DIR/none.img\"\n",
            &["none.img", "does not exist", "truncate"],
        ),
        (
            "a second disk that fails",
            "[[disk]]\nname = \"a\"\npath = \"DIR/good.img\"\n[[disk]]\nname = \"b\"\npath = \"DIR/none.img\"\n",
            &["c.toml:4", "none.img", "does not exist"],
        ),
        (
            "a directory as image",
            "[[disk]]\nname = \"a\"\npath = \"DIR/folder\"\n",
            &["folder", "directory"],
        ),
        (
            "an empty image",
            "[[disk]]\nname = \"a\"\npath = \"DIR/empty.img\"\n",
            &["empty.img", "truncate"],
        ),
        (
            "an image with an odd tail",
            "[[disk]]\nname = \"a\"\npath = \"DIR/odd.img\"\n",
            &["odd.img", "1048676", "truncate"],
        ),
        (
            "qcow2 as raw",
            "[[disk]]\nname = \"a\"\npath = \"DIR/image.qcow2\"\n",
            &["image.qcow2", "qcow2", "format"],
        ),
        (
            "a fifo or device as image",
            "[[disk]]\nname = \"a\"\npath = \"/dev/null\"\n",
            &["/dev/null", "character device"],
        ),
        (
            "one image twice",
            "[[disk]]\nname = \"a\"\npath = \"DIR/good.img\"\nreadonly = false\n[[disk]]\nname = \"b\"\nbackend = \"malloc\"\nsize = \"x\"\n",
            &["c.toml:8", "size"],
        ),
        (
            "a block size that is none",
            "[[disk]]\nname = \"a\"\npath = \"DIR/good.img\"\nblock_size = 1000\n",
            &["1000", "4096"],
        ),
        (
            "a serial that is too long",
            "[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = 512\nserial = \"123456789012345678901\"\n",
            &["serial", "20"],
        ),
        (
            "a controller with a slash",
            "[[disk]]\nname = \"a\"\ncontroller = \"a/b\"\nbackend = \"null\"\nsize = 512\n",
            &["a/b", "path"],
        ),
        ("a socket mode that is none", "[daemon]\nsocket_mode = \"rw\"\n", &["c.toml:2", "0660"]),
    ];
    for (what, text, words) in cases {
        refuse_config(what, "c.toml", text, words);
    }
}

#[test]
fn mistakes_in_a_json_configuration_are_one_line() {
    let call = |method: &str, params: &str| {
        format!(
            "{{\"subsystems\":[{{\"subsystem\":\"bdev\",\"config\":[{{\"method\":\"{method}\",\"params\":{params}}}]}}]}}"
        )
    };
    let cases: &[(&str, String, &[&str])] = &[
        ("bad JSON", "{\"subsystems\": [".to_owned(), &["c.json"]),
        ("no configuration", "[]".to_owned(), &["c.json", "subsystems"]),
        ("unknown method", call("bdev_malloc_creat", "{}"), &["c.json", "bdev_malloc_create"]),
        ("unknown parameter", call("bdev_malloc_create", "{\"blocks\": 1}"), &["c.json", "blocks"]),
        (
            "wrong type",
            call("bdev_malloc_create", "{\"num_blocks\": \"x\", \"block_size\": 512}"),
            &["c.json", "num_blocks"],
        ),
        (
            "missing image",
            call("bdev_uring_create", "{\"name\": \"a\", \"filename\": \"DIR/none.img\"}"),
            &["none.img", "truncate"],
        ),
    ];
    for (what, text, words) in cases {
        refuse_config(what, "c.json", text, words);
    }
}

#[test]
fn mistakes_on_the_command_line_are_one_line() {
    let dir = TempDir::new().expect("a temporary directory");
    let config = dir.path().join("disks.yaml");
    fs::write(&config, "disk: a\n").expect("ours");
    let yaml = config.to_str().expect("UTF-8");
    let missing = dir.path().join("none.toml");
    let cases: &[(&str, &[&str], &[&str])] = &[
        (
            "missing configuration",
            &["-c", missing.to_str().unwrap()],
            &["none.toml", "No such file"],
        ),
        ("unknown extension", &["-c", yaml], &["disks.yaml", ".toml"]),
        ("a directory as configuration", &["-c", dir.path().to_str().unwrap()], &[".toml"]),
        ("a core that does not exist (mask)", &["-m", "0x100000"], &["d: core 20 does not exist"]),
        ("a core that does not exist (list)", &["-m", "[0,63]"], &["63"]),
        ("no core", &["-m", "0"], &["0x1"]),
        ("no set of cores", &["-m", "two"], &["two", "0x5"]),
        ("a group that does not exist", &["--socket-group", "no-such-group"], &["no-such-group"]),
    ];
    for (what, args, words) in cases {
        expect(&refused(dir.path(), &[], RINGMILLD, args), what, words);
    }
}

#[test]
fn a_socket_path_that_is_too_long_is_refused_with_its_limit() {
    let dir = TempDir::new().expect("a temporary directory");
    let long = dir.path().join("x".repeat(100));
    let rpc = long.join("rpc");
    let args = ["-r", rpc.to_str().expect("UTF-8")];
    expect(&refused(dir.path(), &[], RINGMILLD, &args), "a long RPC socket", &["rpc", "107"]);
    // A controller's socket: the daemon is up and goes on.
    let daemon = Daemon::start();
    daemon.call("bdev_malloc_create", &json!({"name": "ram", "block_size": 512, "num_blocks": 8}));
    let name = "n".repeat(120);
    let (code, message) = daemon
        .rpc()
        .try_call("vhost_create_blk_controller", &json!({"ctrlr": name, "dev_name": "ram"}))
        .expect_err("too long");
    assert!(code < 0 && message.contains("107"), "{code} {message}");
    // The bdev is not left claimed.
    daemon.add_controller("short", "ram", &json!({}));
    daemon.stop();
}

#[test]
fn without_permission_the_path_is_named() {
    if !is_root() {
        return skip("refusals for an ordinary user", "needs root to become one");
    }
    let dir = TempDir::new().expect("a temporary directory");
    let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    open(dir.path(), 0o777).expect("ours");
    let program = dir.path().join("ringmilld");
    fs::copy(RINGMILLD, &program).expect("a copy");
    let program = program.to_str().expect("UTF-8");
    let through = [
        "/usr/bin/setpriv",
        "--reuid",
        NOBODY,
        "--regid",
        NOBODY,
        "--clear-groups",
        "--inh-caps=-all",
        "--",
    ];
    let (image, config) = (dir.path().join("secret.img"), dir.path().join("disks.toml"));
    set_len(&image, MIB);
    open(&image, 0o600).expect("ours");
    fs::write(&config, format!("[[disk]]\nname = \"a\"\npath = {image:?}\n")).expect("ours");
    let config = config.to_str().expect("UTF-8");
    let refusal = refused(dir.path(), &through, program, &["-m", "1", "-c", config]);
    expect(&refusal, "an image of somebody else", &["secret.img", "permission"]);

    let closed = dir.path().join("closed");
    fs::create_dir(&closed).expect("ours");
    open(&closed, 0o700).expect("ours");
    let rpc = closed.join("rpc");
    let refusal = refused(dir.path(), &through, program, &["-r", rpc.to_str().expect("UTF-8")]);
    expect(&refusal, "a socket in somebody else's directory", &["closed/rpc"]);
    open(&image, 0o644).expect("ours");
    let refusal = refused(dir.path(), &through, program, &["-m", "1", "-c", config]);
    expect(&refusal, "an image that may only be read", &["secret.img", "permission", "readonly"]);
    fs::write(config, "[daemon]\n").expect("ours");
    open(Path::new(config), 0o600).expect("ours");
    let refusal = refused(dir.path(), &through, program, &["-c", config]);
    expect(&refusal, "somebody else's configuration", &["disks.toml", "Permission denied"]);
}

#[test]
fn an_image_that_another_daemon_has_is_refused_after_a_bounded_wait() {
    let first = Daemon::start();
    let image = first.dir().join("disk.img");
    set_len(&image, MIB);
    first.add_uring("disk", &image, &json!({}));
    let dir = TempDir::new().expect("a temporary directory");
    let config = dir.path().join("disks.toml");
    fs::write(&config, format!("[[disk]]\nname = \"vm\"\npath = {image:?}\n")).expect("ours");
    let asked = Instant::now();
    let refusal = refused(dir.path(), &[], RINGMILLD, &["-c", config.to_str().expect("UTF-8")]);
    assert_eq!(refusal.code, Some(1), "{}", refusal.stderr);
    // One line when the wait begins, one when it was in vain.
    let lines: Vec<&str> = refusal.stderr.trim_end().lines().collect();
    assert_eq!(lines.len(), 2, "{}", refusal.stderr);
    for line in lines {
        assert!(line.contains("disk.img"), "{line}");
    }
    assert!(asked.elapsed() < Duration::from_secs(20));
    first.stop();
}

/// Sends bytes, hangs up, and returns what came back before the daemon did.
fn throw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).expect("the RPC accepts");
    stream.set_read_timeout(Some(WAIT_MAX)).expect("a socket");
    // The daemon may close before it has read everything.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn rubbish_on_the_rpc_leaves_everyone_else_served() {
    let mut daemon = Daemon::start();
    let socket = daemon.add_malloc("ram", 4 * MIB, 512);
    let mut exercise = Exercise::new(connect(&socket, 1, 8, 65536), 8, 1);
    let rpc_socket = daemon.rpc_socket.clone();

    // Noise, with and without an opening brace.
    let mut noise = Vec::new();
    while noise.len() < 4096 {
        noise.extend(exercise.entropy.next_u64().to_le_bytes());
    }
    throw(&rpc_socket, &noise);
    noise[0] = b'{';
    throw(&rpc_socket, &noise);
    exercise.random_rounds(100, 1024, 64);

    for (what, bytes, code) in [
        ("no JSON", b"hello\n".to_vec(), "-32700"),
        ("deep nesting", vec![b'['; 100_000], "-32"),
        ("deep objects", b"{\"a\":".repeat(20_000), "-32"),
        (
            "a long request",
            [b"{\"method\":\"".as_slice(), &[b'a'; 300 << 10], b"\"}"].concat(),
            "-32",
        ),
        (
            "a long string that never ends",
            [b"{\"method\":\"".as_slice(), &[b'a'; 400 << 10]].concat(),
            "-32",
        ),
        ("a number as a request", b"7".to_vec(), "-32600"),
        ("an empty batch", b"[]".to_vec(), "-32600"),
        ("a NUL in the middle", b"{\"method\":\0\"a\"}".to_vec(), "-32700"),
        ("bad UTF-8", b"{\"id\":1,\"method\":\"\xff\xfe\"}".to_vec(), "-32"),
    ] {
        let answer = throw(&rpc_socket, &bytes);
        assert!(answer.contains(code), "{what}: {answer:?}");
        exercise.random_rounds(50, 1024, 64);
        daemon.call("spdk_get_version", &json!({}));
    }
    // Half a request, then gone; a request whose answer nobody reads.
    for _ in 0..20 {
        throw(&rpc_socket, b"{\"jsonrpc\":\"2.0\",\"id\":1,\"meth");
        let mut stream = UnixStream::connect(&rpc_socket).expect("the RPC accepts");
        for _ in 0..50 {
            if stream.write_all(b"{\"id\":1,\"method\":\"rpc_get_methods\"}").is_err() {
                break;
            }
        }
        drop(stream);
    }
    exercise.random_rounds(200, 1024, 64);

    // More connections than there may be: those above the limit are told so, the others live, and places are freed.
    let mut held = Vec::new();
    for _ in 0..64 {
        held.push(UnixStream::connect(&rpc_socket).expect("the RPC accepts"));
    }
    let mut turned_away = String::new();
    let is_told = wait_for(Duration::from_secs(5), || {
        turned_away = throw(&rpc_socket, b"{\"id\":1,\"method\":\"spdk_get_version\"}");
        turned_away.contains("64")
    });
    assert!(is_told, "the 65th connection got {turned_away:?}");
    exercise.random_rounds(200, 1024, 64);
    let last = held.pop().expect("64 of them");
    (&last).write_all(b"{\"id\":9,\"method\":\"framework_wait_init\"}").expect("it is served");
    last.set_read_timeout(Some(WAIT_MAX)).expect("a socket");
    let mut answer = [0; 64];
    let count = (&last).read(&mut answer).expect("an answer");
    assert!(String::from_utf8_lossy(&answer[..count]).contains("true"));
    held.clear();
    drop(last);
    let is_free = wait_for(Duration::from_secs(5), || {
        throw(&rpc_socket, b"{\"id\":1,\"method\":\"spdk_get_version\"}").contains("version")
    });
    assert!(is_free, "places are not freed");
    exercise.random_rounds(200, 1024, 64);
    exercise.verify();
    assert!(daemon.is_alive());
    drop(exercise);
    daemon.stop();
}
