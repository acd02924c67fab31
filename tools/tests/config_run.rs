//! A configuration file from the disk to the engine, also with operations that end later.

mod support;

use ringmill_tools::{
    config::{
        self,
        run::{ConfigRun, Step},
    },
    rpc::{Dispatcher, engine::Engine},
};
use support::FakeEngine;

/// Runs a file's calls as a daemon does: step, hand over what the engine finished, step.
fn run(text: &str, name: &str) -> Result<FakeEngine, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    let shown = |error: config::ConfigError| {
        error.to_string().replace(dir.path().to_str().unwrap(), "/dir")
    };
    let config = config::load(&path).map_err(shown)?;
    let mut engine = FakeEngine::default();
    let mut dispatcher = Dispatcher::new();
    let mut run = ConfigRun::new(config.calls);
    let mut waits_count = 0;
    while run.step(&mut dispatcher, &mut engine).map_err(shown)? == Step::Waiting {
        waits_count += 1;
        for (token, result) in std::mem::take(&mut engine.finished) {
            let answer = dispatcher.finished(token, result);
            assert_eq!(run.finished(token, answer).map_err(shown)?, None, "nobody else asked");
        }
        assert!(waits_count < 10, "the run hangs");
    }
    Ok(engine)
}

#[test]
fn a_toml_file_makes_its_disks_in_order() {
    let engine = run(
        "[daemon]\nidle = \"poll\"\n[[disk]]\nname = \"slow1\"\nbackend = \"malloc\"\nsize = \"1M\"\n\
         [[disk]]\nname = \"n1\"\nbackend = \"null\"\nsize = \"1G\"\ncontroller = \"vm\"\n",
        "a.toml",
    )
    .unwrap();
    let names: Vec<String> =
        engine.controllers().into_iter().map(|controller| controller.name).collect();
    assert_eq!(names, ["slow1", "vm"]);
}

#[test]
fn mistakes_are_found_before_the_first_call_and_failures_name_their_line() {
    for (name, text, want) in [
        ("a.yaml", "", "/dir/a.yaml: a configuration is a .toml or a .json file; rename it"),
        (
            "a.toml",
            "[[disk]]\nname = 1\n",
            "/dir/a.toml:2:8: \"name\" must be a string in quotes, not the number 1",
        ),
        (
            "a.toml",
            "[[disk]]\nname = \"a\"\nbackend = \"null\"\nsize = \"4k\"\n[[disk]]\nname = \"b\"\npath = \"/no/such\"\n",
            "/dir/a.toml:5:1 (bdev_uring_create): cannot open /no/such: No such file or directory (os error 2)",
        ),
        (
            "a.json",
            r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":"bdev_nul_create"}]}]}"#,
            "/dir/a.json: subsystem \"bdev\", call 1 (bdev_nul_create): Method not found; did you mean \"bdev_null_create\"?",
        ),
        (
            "a.json",
            r#"{"subsystems":[{"subsystem":"bdev","config":[{"method":"bdev_null_create","params":{"name":"a"}}]}]}"#,
            "/dir/a.json: subsystem \"bdev\", call 1 (bdev_null_create): bdev_null_create needs the parameter \"num_blocks\": size in blocks",
        ),
    ] {
        assert_eq!(run(text, name).err().as_deref(), Some(want));
    }
    let missing = config::load(std::path::Path::new("/no/such.toml")).unwrap_err().to_string();
    assert!(missing.starts_with("/no/such.toml: cannot read the configuration"), "{missing}");
}
