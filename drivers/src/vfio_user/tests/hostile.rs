//! Servers that break the protocol, hang up or fall silent at any of their answers.

use std::time::{Duration, Instant};

use super::super::protocol::{Header, flags};
use super::super::wire::Message;
use super::super::*;
use super::{Next, Peer, exercise, fake, good, soon};
use crate::pci::Registers;

/// Ways to answer one command wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    HangUp,
    HangUpInHeader,
    HangUpInPayload,
    Silence,
    StopInPayload,
    WrongId,
    WrongCommand,
    Twice,
    Length4Gib,
    LengthBelowHeader,
    LengthOneMore,
    WrongType,
    ReplyToNothing,
    Zeroes,
    Ones,
    // Harmless.
    ManyFds,
    LongAnswer,
    QuestionFirst,
    Error,
    ErrorWithoutErrno,
    Empty,
}

const DEADLY: [Lie; 15] = [
    Lie::HangUp,
    Lie::HangUpInHeader,
    Lie::HangUpInPayload,
    Lie::Silence,
    Lie::StopInPayload,
    Lie::WrongId,
    Lie::WrongCommand,
    Lie::Twice,
    Lie::Length4Gib,
    Lie::LengthBelowHeader,
    Lie::LengthOneMore,
    Lie::WrongType,
    Lie::ReplyToNothing,
    Lie::Zeroes,
    Lie::Ones,
];

const HARMLESS: [Lie; 6] = [
    Lie::ManyFds,
    Lie::LongAnswer,
    Lie::QuestionFirst,
    Lie::Error,
    Lie::ErrorWithoutErrno,
    Lie::Empty,
];

fn lie(peer: &mut Peer, message: &Message, lie: Lie) -> Next {
    let header = Header { flags: flags::REPLY, ..message.header };
    // Long enough to be taken for any command's answer.
    let payload = vec![0; 64];
    let mut bytes = header.message(&payload);
    let mut set = |at: usize, with: &[u8]| bytes[at..at + with.len()].copy_from_slice(with);
    match lie {
        Lie::HangUp => return Next::Quit,
        Lie::HangUpInHeader => {
            peer.raw(&bytes[..7]);
            return Next::Quit;
        }
        Lie::HangUpInPayload => {
            peer.raw(&bytes[..30]);
            return Next::Quit;
        }
        Lie::Silence => return Next::Done,
        Lie::StopInPayload => bytes.truncate(30),
        Lie::WrongId => set(0, &(header.id ^ 0x8000).to_le_bytes()),
        Lie::WrongCommand => set(2, &(header.command + 1).to_le_bytes()),
        Lie::Twice => {
            peer.answer(message);
            peer.answer(message);
            return Next::Done;
        }
        Lie::Length4Gib => set(4, &u32::MAX.to_le_bytes()),
        Lie::LengthBelowHeader => set(4, &15u32.to_le_bytes()),
        // The next message is then read one byte off, or never whole.
        Lie::LengthOneMore => set(4, &81u32.to_le_bytes()),
        Lie::WrongType => set(8, &2u32.to_le_bytes()),
        Lie::ReplyToNothing => {
            let id = header.id ^ 0x4000;
            peer.send(Header { id, ..header }, &[], &[]);
            return Next::Answer;
        }
        Lie::Zeroes => bytes.fill(0),
        Lie::Ones => bytes.fill(0xff),
        Lie::ManyFds => {
            let fds = vec![peer.bar.as_fd(); ringmill_core::limits::VFIO_USER_FDS_MAX];
            let question = Header { id: 5, flags: flags::NO_REPLY, command: 99, ..header };
            peer.send(question, &[], &fds);
            return Next::Answer;
        }
        Lie::LongAnswer => set(4, &80u32.to_le_bytes()),
        Lie::QuestionFirst => {
            let question = Header { flags: flags::NO_REPLY, command: command::DMA_READ, ..header };
            peer.send(question, &[1; 16], &[]);
            return Next::Answer;
        }
        Lie::Error => {
            peer.refuse(message, Errno::PERM);
            return Next::Done;
        }
        Lie::ErrorWithoutErrno => {
            peer.send(Header { flags: flags::REPLY | flags::ERROR, ..header }, &[], &[]);
            return Next::Done;
        }
        Lie::Empty => {
            peer.reply(message, &[], &[]);
            return Next::Done;
        }
    }
    peer.raw(&bytes);
    Next::Done
}

/// Every command of a whole life, each lied about once; the errors and whether the device was gone at the end.
fn live_through(which: Lie, at: usize) -> Option<(Vec<String>, bool)> {
    let mut count = 0;
    let fake = fake(move |peer, message| {
        count += 1;
        if count - 1 != at {
            return Next::Answer;
        }
        lie(peer, message, which)
    });
    let start = Instant::now();
    let lived = match fake.connect() {
        Ok(backing) => {
            let errors = exercise(&backing);
            // A lie about the last answer is found after it.
            std::thread::sleep(Duration::from_millis(10));
            let gone = backing.config_read(0, &mut [0; 1]).is_err();
            (errors, gone)
        }
        Err(error) => (vec![error.to_string()], true),
    };
    assert!(start.elapsed() < Duration::from_secs(8), "{which:?} at {at}: {:?}", start.elapsed());
    let asked = fake.end().seen.len();
    (asked > at).then_some(lived)
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn nothing_is_left(fds_before: usize, threads_before: usize) {
    let deadline = soon();
    while open_fds() > fds_before || threads() > threads_before {
        assert!(Instant::now() < deadline, "{} descriptors, {} threads", open_fds(), threads());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Commands from connecting to the reset at the end of `exercise`.
const COMMANDS: usize = 26;

#[test]
fn a_good_life_has_that_many_commands() {
    let fake = good();
    let backing = fake.connect().unwrap();
    assert_eq!(exercise(&backing), [""; 0]);
    drop(backing);
    // Closing has three more: bus master, interrupts, reset.
    assert_eq!(fake.end().seen.len(), COMMANDS + 3);
}

#[test]
fn a_server_that_breaks_the_protocol_anywhere_is_cut_off() {
    // Only this test's threads: it runs in a process of its own under nextest, and waits otherwise.
    let before = (open_fds(), threads());
    for which in DEADLY {
        std::thread::scope(|scope| {
            for at in 0..COMMANDS {
                scope.spawn(move || {
                    let (_, gone) = live_through(which, at).expect("the command was sent");
                    // Nobody needs an answer about a vector: the reactor stays awake then.
                    let is_vector = (COMMANDS - 3..COMMANDS - 1).contains(&at);
                    assert!(
                        gone || which == Lie::Silence && is_vector,
                        "{which:?} at command {at}"
                    );
                });
            }
        });
    }
    nothing_is_left(before.0, before.1);
}

#[test]
fn a_server_that_refuses_or_says_too_much_is_survived() {
    let before = (open_fds(), threads());
    for which in HARMLESS {
        std::thread::scope(|scope| {
            for at in 0..COMMANDS {
                scope.spawn(move || {
                    let (errors, _) = live_through(which, at).expect("the command was sent");
                    if matches!(which, Lie::ManyFds | Lie::QuestionFirst) {
                        assert!(errors.is_empty(), "{which:?} at command {at}: {errors:?}");
                    }
                });
            }
        });
    }
    nothing_is_left(before.0, before.1);
}

#[test]
fn a_version_that_is_garbage_is_an_error_in_words() {
    for (data, expect) in [
        (&b"\0\0\x01\0{\"capabilities\":\0"[..], "not JSON"),
        (&b"\0\0\x01\0\xff\xfe\xfd\0"[..], "not JSON"),
        (&b"\x01\0\0\0{}\0"[..], "speaks vfio-user 1.0"),
        (&b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":0}}\0"[..], "max_msg_fds is 0"),
        (&b"\0"[..], "too short"),
    ] {
        let fake = fake(move |peer, message| {
            peer.reply(message, data, &[]);
            Next::Done
        });
        let error = fake.connect().unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
        fake.end();
    }
}

#[test]
fn many_threads_ask_at_once_and_each_gets_its_own_answer() {
    let fake = good();
    let backing = fake.connect().unwrap();
    let registers = backing.registers(0, 0x2000).unwrap();
    std::thread::scope(|scope| {
        for k in 0..8usize {
            let registers = &registers;
            scope.spawn(move || {
                for n in 0..200u32 {
                    let value = n << 8 | u32::try_from(k).unwrap();
                    registers.write_u32(0x100 + 4 * k, value);
                    assert_eq!(registers.read_u32(0x100 + 4 * k), value);
                }
            });
        }
    });
}
