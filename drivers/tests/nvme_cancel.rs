//! Attaching a controller that does not come up is cancelled, in whatever it waits for.

mod nvme;

use std::time::{Duration, Instant};

use nvme::{Heard, namespace, patient};
use ringmill_core::spec::nvme::admin;
use ringmill_drivers::model::{Action, Match, ModelControl, ModelOptions, start};
use ringmill_drivers::nvme::{NvmeOptions, attach_until};
use ringmill_drivers::pci::CancelToken;

/// What the controller may take, and what nobody waits for.
const LONG: Duration = Duration::from_secs(50);

fn cancel_while(breaks: impl Fn(&ModelControl)) {
    let options = ModelOptions { ready_timeout_500ms: 100, ..ModelOptions::default() };
    let (backing, model) = start(options, vec![namespace(1, 9)]).unwrap();
    breaks(&model);
    let waits = NvmeOptions { ready_timeout_max: LONG, timeout_admin: LONG, ..patient() };
    let token = CancelToken::default();
    let began = Instant::now();
    let heard = Heard::default();
    std::thread::scope(|scope| {
        let attempt =
            scope.spawn(|| attach_until(backing, waits, &[], heard.listener(), &token).err());
        std::thread::sleep(Duration::from_millis(400));
        assert!(!attempt.is_finished(), "it does not come up by itself");
        assert!(token.cancel());
        let error = attempt.join().unwrap().expect("it was cancelled");
        assert!(error.is_gone(), "{error}");
    });
    assert!(began.elapsed() < LONG / 2, "{:?}", began.elapsed());
    assert_eq!(model.mapped_count(), 0, "no memory is left to the device");
    assert_eq!(heard.all(), []);
}

#[test]
fn while_it_does_not_get_ready() {
    cancel_while(|model| model.set_ready_stuck(true));
}

#[test]
fn while_a_command_has_no_answer() {
    cancel_while(|model| model.rule(Match::admin(admin::IDENTIFY), Action::Swallow));
}

#[test]
fn before_it_has_begun() {
    let (backing, model) = start(ModelOptions::default(), vec![namespace(1, 9)]).unwrap();
    let (token, heard) = (CancelToken::default(), Heard::default());
    assert!(token.cancel());
    let error = attach_until(backing, patient(), &[], heard.listener(), &token).unwrap_err();
    assert!(error.is_gone(), "{error}");
    assert_eq!(model.mapped_count(), 0, "no memory is left to the device");
    assert_eq!(model.complaint(), None);
}
