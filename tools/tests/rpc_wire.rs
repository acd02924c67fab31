//! The RPC's wire behaviour, driven through a real socket with hand-written text.

mod support;

use std::{
    io::Write,
    net::Shutdown,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::FakeDaemon;

#[test]
fn one_request_in_single_bytes_is_answered_once() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    for byte in
        r#" { "jsonrpc": "2.0", "method" : "framework_wait_init", "id": "ä\"}" } "#.as_bytes()
    {
        client.stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.receive(), Some(json!({"jsonrpc": "2.0", "id": "ä\"}", "result": true})));
}

#[test]
fn pipelined_requests_and_ids_of_every_kind_are_answered() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    client.send(
        r#"{"method":"log_get_level","id":1}{"method":"log_get_level","id":"two"}
           {"method":"log_get_level","id":null} {"method":"log_get_level","id":4.5,"params":null}"#,
    );
    for id in [json!(1), json!("two"), Value::Null, json!(4.5)] {
        let reply = client.receive().unwrap();
        assert_eq!((&reply["id"], &reply["result"]), (&id, &json!("NOTICE")));
    }
}

#[test]
fn a_notification_acts_and_gets_no_reply() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    client.send(
        r#"{"method":"log_set_level","params":{"level":"debug"}}{"method":"no_such_method"}"#,
    );
    let reply = client.ask(r#"{"method":"log_get_level","id":9}"#);
    assert_eq!((&reply["id"], &reply["result"]), (&json!(9), &json!("DEBUG")));
}

#[test]
fn a_batch_is_answered_by_one_array_also_with_deferred_parts() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    let reply = client.ask(
        r#"[{"method":"bdev_null_create","params":{"name":"slow0","num_blocks":8,"block_size":512},"id":"a"},
            {"method":"framework_wait_init"}, 5, [], {"method":"nope","id":"b"},
            {"method":"framework_wait_init","id":"c"}]"#,
    );
    let items = reply.as_array().unwrap();
    assert_eq!(items.len(), 5);
    assert_eq!((&items[0]["id"], &items[0]["result"]), (&json!("a"), &json!("slow0")));
    assert_eq!(items[1]["error"]["code"], -32600);
    assert_eq!(items[2]["error"]["code"], -32600);
    assert_eq!(items[3]["error"]["code"], -32601);
    assert_eq!(items[4]["result"], true);
    // Nothing but notifications: no reply at all, the next one is the single request's.
    client.send(r#"[{"method":"framework_wait_init"}]"#);
    assert_eq!(client.ask("[]")["error"]["code"], -32600);
    let batch = format!("[{}0]", "0,".repeat(256));
    assert!(client.ask(&batch)["error"]["message"].as_str().unwrap().contains("257 requests"));
}

#[test]
fn what_is_not_json_is_answered_and_the_connection_closed() {
    let daemon = FakeDaemon::start();
    for garbage in
        ["GET / HTTP/1.1\r\n\r\n", "{nope}", "{\"a\":\u{1}}", "[1}", "\u{0}\u{0}", "truly\n"]
    {
        let mut client = daemon.connect();
        client.send(garbage);
        let reply = client.receive().unwrap();
        assert_eq!(
            (&reply["id"], &reply["error"]["code"]),
            (&Value::Null, &json!(-32700)),
            "{garbage:?}"
        );
        assert_eq!(client.receive(), None, "{garbage:?}");
    }
}

#[test]
fn requests_that_are_json_but_no_requests_keep_the_connection() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    assert_eq!(client.ask("17 ")["error"]["code"], -32600);
    assert_eq!(
        client.ask(r#"{"method":"log_get_level","params":[1],"id":3}"#)["error"]["code"],
        -32602
    );
    assert_eq!(client.ask(r#"{"method":7,"id":3}"#)["id"], 3);
    let reply = client.ask(r#"{"method":"bdev_null_creat","id":3}"#);
    assert_eq!(reply["error"]["code"], -32601);
    let message = reply["error"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("Method not found") && message.contains("bdev_null_create"),
        "{message}"
    );
    assert_eq!(client.call("framework_wait_init", "null"), true);
}

#[test]
fn depth_and_length_have_limits_with_clear_errors() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    let deep = format!(
        r#"{{"method":"log_get_level","params":{}{},"id":1}}"#,
        "[".repeat(40),
        "]".repeat(40)
    );
    let reply = client.ask(&deep);
    assert!(reply["error"]["message"].as_str().unwrap().contains("deeper than 32"), "{reply}");
    let fits = format!(r#"{{"method":"log_get_level","id":"{}"}}"#, "x".repeat(250 * 1024));
    assert_eq!(client.ask(&fits)["result"], "NOTICE");
    let long = format!(r#"{{"method":"log_get_level","id":"{}"}}"#, "x".repeat(257 * 1024));
    let reply = client.ask(&long);
    assert!(reply["error"]["message"].as_str().unwrap().contains("262144 bytes"), "{reply}");
    assert_eq!(client.receive(), None);
}

#[test]
fn a_client_that_shuts_down_its_side_still_gets_its_replies() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    client.send(
        r#"{"method":"bdev_null_create","params":{"name":"slow1","num_blocks":8,"block_size":512},"id":1}{"method":"#,
    );
    client.stream.shutdown(Shutdown::Write).unwrap();
    let replies = [client.receive().unwrap(), client.receive().unwrap()];
    assert!(replies.iter().any(|reply| reply["result"] == "slow1"), "{replies:?}");
    assert!(replies.iter().any(|reply| reply["error"]["code"] == -32700), "{replies:?}");
    assert_eq!(client.receive(), None);
}

#[test]
fn a_client_that_sends_and_leaves_is_still_obeyed() {
    let daemon = FakeDaemon::start();
    let mut client = daemon.connect();
    let text = r#"{"method":"log_set_level","params":{"level":"INFO"}}"#.repeat(500)
        + r#"{"method":"log_set_level","params":{"level":"ERROR"}}"#;
    client.send(&text);
    drop(client);
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut other = daemon.connect();
    while other.call("log_get_level", "null") != "ERROR" {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_sixty_fifth_client_is_told_so_and_others_go_on() {
    let daemon = FakeDaemon::start();
    let mut clients: Vec<_> = (0..64).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.call("framework_wait_init", "null"), true);
    }
    let mut refused = daemon.connect();
    let reply = refused.receive().unwrap();
    assert!(reply["error"]["message"].as_str().unwrap().contains("64 RPC clients"), "{reply}");
    assert_eq!(refused.receive(), None);
    clients.pop();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut client = daemon.connect();
        if client.ask(r#"{"method":"framework_wait_init","id":1}"#)["result"] == true {
            break;
        }
        assert!(Instant::now() < deadline, "no room though a client left");
    }
    assert_eq!(clients[0].call("framework_wait_init", "null"), true);
}

#[test]
fn a_client_that_never_reads_is_held_back_and_blocks_nobody() {
    let daemon = FakeDaemon::start();
    let flood = UnixStream::connect(&daemon.socket).unwrap();
    flood.set_nonblocking(true).unwrap();
    let request = r#"{"method":"rpc_get_methods","id":1}"#.repeat(100);
    let mut sent_bytes = 0;
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut stalled = 0;
    // Replies are 30 times as long as requests: an unbounded queue would take everything.
    while Instant::now() < deadline && stalled < 20 {
        match (&flood).write(request.as_bytes()) {
            Ok(count) => {
                sent_bytes += count;
                stalled = 0;
            }
            Err(_) => {
                stalled += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    assert!(stalled >= 20, "the daemon read on: {sent_bytes} bytes");
    let begun = Instant::now();
    let mut client = daemon.connect();
    for _ in 0..100 {
        assert_eq!(client.call("framework_wait_init", "null"), true);
    }
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[test]
fn random_bytes_never_end_the_daemon() {
    let daemon = FakeDaemon::start();
    let alphabet = br#"{}[]":,\ 0truenl"methodid"#;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..300 {
        let mut bytes = Vec::new();
        for _ in 0..200 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let high = usize::try_from(state >> 33).unwrap();
            bytes.push(alphabet[high % alphabet.len()]);
        }
        let mut client = daemon.connect();
        let _ = client.stream.write_all(&bytes);
    }
    // While it still reads what they have sent it may be full, and turns others away, with words or by closing.
    let is_served = || {
        let mut client = daemon.connect();
        let sent = client.stream.write_all(br#"{"method":"framework_wait_init","id":1}"#);
        sent.is_ok() && client.receive().is_some_and(|reply| reply["result"] == true)
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_served() {
        assert!(Instant::now() < deadline, "nobody is served any more");
        std::thread::sleep(Duration::from_millis(5));
    }
}
