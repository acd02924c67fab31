//! Bringing a device up has an end, whatever its server does to put it off.

use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use super::super::protocol::{Header, flags};
use super::super::wire::Message;
use super::super::*;
use super::{Fake, Next, PATIENCE, Peer, fake, good};
use crate::pci::Ended;

/// For ever, as far as a test is concerned.
const HOUR: Duration = Duration::from_secs(3600);

fn connect(
    fake: &Fake,
    answer: Duration,
    token: &CancelToken,
) -> Result<VfioUserBacking, PciError> {
    VfioUserBacking::connect_with(fake.dir.path(), Patience { answer, ..PATIENCE }, token)
}

/// Answers with a byte now and then.
fn dribble(peer: &mut Peer, message: &Message) -> Next {
    let bytes = Header { flags: flags::REPLY, ..message.header }.message(&[b' '; 4096]);
    for byte in bytes {
        std::thread::sleep(Duration::from_millis(20));
        if peer.stream.write_all(&[byte]).is_err() {
            return Next::Quit;
        }
    }
    Next::Done
}

fn assert_gone(result: Result<VfioUserBacking, PciError>) {
    let error = result.expect_err("it is not up");
    assert!(matches!(error, PciError::Gone { .. }), "{error}");
}

#[test]
fn a_server_that_is_always_just_in_time_is_cut_off_at_the_end_of_the_attempt() {
    let pause = Duration::from_millis(400);
    let fake = fake(move |_, _| {
        std::thread::sleep(pause);
        Next::Answer
    });
    let token = CancelToken::new(Some(3 * pause));
    assert_gone(connect(&fake, HOUR, &token));
    assert_eq!(token.ended(), Some(Ended::Late));
    let asked = fake.end().seen.len();
    assert!(asked <= 3, "asked {asked} times");
}

#[test]
fn a_server_that_dribbles_its_answer_is_cut_off() {
    // By the time for an answer, and by that for the attempt.
    for (answer, attempt) in
        [(Duration::from_millis(500), HOUR), (HOUR, Duration::from_millis(500))]
    {
        let fake = fake(dribble);
        let token = CancelToken::new(Some(attempt));
        assert_gone(connect(&fake, answer, &token));
        assert_eq!(token.ended().is_some(), attempt < HOUR);
        assert!(fake.end().seen.len() <= 1);
    }
}

#[test]
fn an_attempt_is_cancelled_while_its_server_is_silent() {
    let (asks, asked) = mpsc::channel();
    let fake = fake(move |_, _| {
        asks.send(()).unwrap();
        Next::Done
    });
    let token = CancelToken::default();
    std::thread::scope(|scope| {
        let attempt = scope.spawn(|| connect(&fake, HOUR, &token));
        asked.recv().unwrap();
        assert!(!attempt.is_finished() && token.cancel());
        assert_gone(attempt.join().unwrap());
    });
    assert_eq!(token.ended(), Some(Ended::Cancelled));
    assert_eq!(fake.end().seen.len(), 1);
    // And before it has begun.
    let fake = good();
    assert_gone(connect(&fake, HOUR, &token));
    assert_eq!(fake.end().seen.len(), 0);
}

#[test]
fn a_device_that_is_up_outlives_its_attempt() {
    let fake = good();
    let token = CancelToken::new(Some(Duration::from_secs(5)));
    let backing = connect(&fake, HOUR, &token).unwrap();
    assert!(token.finish() && !token.cancel());
    std::thread::sleep(Duration::from_millis(5100));
    backing.config_read(0, &mut [0; 4]).unwrap();
    assert_eq!(backing.news(), None);
}
