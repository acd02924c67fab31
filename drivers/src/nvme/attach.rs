//! Attaching: from a PCI function to a controller with a thread of its own, and the handle on it.
//!
//! Flow: open → queue pairs for the reactors → namespaces → thread. Owner: a job thread, then whoever holds the handle.
//! **Invariant:** what fails on the way leaves a closed backing and nothing running.

use std::os::fd::AsFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use ringmill_core::bdev::Bdev;
use ringmill_core::reactor::{DeviceKey, ReactorHandle};
use rustix::event::{EventfdFlags, eventfd};

use super::controller::Controller;
use super::joint::{HomePair, Joint, Parts, Request};
use super::namespaces::refresh;
use super::pairs::{InterruptPlan, PairOrder, make_pair};
use super::registers::WantedBack;
use super::report::{ControllerInfo, ControllerState, Counters, Health};
use super::thread::Keeper;
use super::{Namespace, NvmeControl, NvmeError, NvmeEvents, NvmeOptions};
use crate::pci::{CancelToken, PciBacking};

/// Queue pairs for threads that are no reactors, where there are no reactors.
const LOOSE_PAIRS: u16 = 16;

/// The longest name of a thread that the kernel keeps.
const THREAD_NAME_BYTES: usize = 15;

/// An attached controller.
#[derive(Debug)]
struct Handle<B: PciBacking> {
    common: Arc<Joint<B>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub(super) fn attach<B: PciBacking>(
    backing: B,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
    token: &CancelToken,
) -> Result<Arc<dyn NvmeControl>, NvmeError> {
    options.check()?;
    let backing = Arc::new(backing);
    match start(&backing, options, reactors, events, token) {
        Ok(handle) if token.finish() => Ok(Arc::new(handle)),
        Ok(handle) => {
            handle.detach();
            Err(NvmeError::Cancelled { device: backing.name().to_owned() })
        }
        Err(error) => {
            backing.close();
            Err(error)
        }
    }
}

/// How many pairs are asked for.
fn pairs_wanted(options: &NvmeOptions, reactors: usize) -> u16 {
    let asked = u16::try_from(options.num_io_queues).unwrap_or(u16::MAX);
    let reactors = u16::try_from(reactors).unwrap_or(u16::MAX);
    match (reactors, asked) {
        (0, 0) => LOOSE_PAIRS,
        (0, asked) => asked,
        (reactors, 0) => reactors,
        (reactors, asked) => asked.min(reactors),
    }
}

fn start<B: PciBacking>(
    backing: &Arc<B>,
    options: NvmeOptions,
    reactors: &[ReactorHandle],
    events: NvmeEvents,
    token: &CancelToken,
) -> Result<Handle<B>, NvmeError> {
    let wanted = pairs_wanted(&options, reactors.len());
    // Dropped after the controller, which cuts the device off.
    let (mut pairs, mut homes) = (Vec::new(), Vec::new());
    let mut controller = Controller::open(Arc::clone(backing), &options, wanted, token)?;
    let granted = controller.ask_for_pairs(wanted)?;
    controller.set_up_shadow(granted)?;
    let io_error = |what: &str, source: rustix::io::Errno| crate::pci::PciError::Io {
        device: backing.name().to_owned(),
        what: what.to_owned(),
        source: source.into(),
    };
    let new_eventfd = || {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Arc::new)
            .map_err(|errno| io_error("cannot make an eventfd", errno))
    };
    let (nudge, interrupt) = (new_eventfd()?, new_eventfd()?);
    let plan = InterruptPlan::new(backing.vectors_count(), granted);
    if plan == InterruptPlan::Own {
        // Events of the device are seen at once; without it, at the next look.
        backing.bind_vector(0, Some(interrupt.as_fd()))?;
    }
    let key = DeviceKey::next();
    for (number, reactor) in (1..=granted).zip(reactors) {
        let order = PairOrder {
            key,
            options: &options,
            plan,
            nudge: &nudge,
            queue_id: number,
            home: Some(reactor.clone()),
        };
        let (pair, queue_pair) = make_pair(&mut controller, order)?;
        pairs.push(pair);
        let waiting = Arc::new(Mutex::new(Some(queue_pair)));
        homes.push(HomePair { reactor: reactor.clone(), waiting });
    }
    let is_fewer = homes.len() < reactors.len();
    let owners = is_fewer.then(|| homes.iter().map(|own| own.reactor.clone()).collect());
    let (to_thread, requests) = channel();
    let common = Arc::new(Joint::new(Parts {
        key,
        fixed: describe(&controller, &options, (granted, wanted)),
        options,
        backing: Arc::clone(backing),
        homes,
        owners,
        requests: to_thread,
        nudge: Arc::clone(&nudge),
    }));
    for pair in &pairs {
        common.count_pair(&pair.shared);
    }
    let end = refresh(&mut controller, &common).map(|_| ());
    if let Err(error) = end.and_then(|()| controller.watch_events()) {
        // Before the memory is taken away that it may write to.
        backing.close();
        common.forget();
        return Err(error);
    }
    let asked = Arc::clone(&common);
    controller.bar.wanted_back = Some(WantedBack(Arc::new(move || asked.wanted())));
    let keeper = Keeper {
        controller,
        common: Arc::clone(&common),
        pairs,
        pairs_max: granted,
        interrupts: plan,
        events,
        requests,
        nudge,
        interrupt,
        lost: false,
        resets: std::collections::VecDeque::new(),
        commands_seen: 0,
        stale_seen: 0,
        warnings_seen: 0,
        unread: super::events::Unread::default(),
        last_look: Instant::now(),
        last_wanted: Instant::now(),
        bound: false,
        last_told: None,
    };
    let name = format!("nvme-{}", common.options.name);
    let short = name.chars().take(THREAD_NAME_BYTES).collect();
    let thread = std::thread::Builder::new().name(short).spawn(move || keeper.run());
    let thread = thread.map_err(|source| crate::pci::PciError::Io {
        device: backing.name().to_owned(),
        what: "cannot start its thread".to_owned(),
        source,
    })?;
    tracing::info!(
        "{}: {} {}, {} queue pairs",
        common.options.name,
        common.fixed.model,
        common.fixed.serial,
        common.fixed.queue_pairs
    );
    Ok(Handle { common, thread: Mutex::new(Some(thread)) })
}

fn describe<B: PciBacking>(
    controller: &Controller<B>,
    options: &NvmeOptions,
    (pairs, wanted): (u16, u16),
) -> ControllerInfo {
    let data = &controller.data;
    let (major, minor, tertiary) = controller.version;
    if pairs < wanted {
        tracing::warn!("{}: it grants {pairs} queue pairs of {wanted}", options.name);
    }
    ControllerInfo {
        name: options.name.clone(),
        state: ControllerState::Enabled,
        address: controller.backing.name().to_owned(),
        cntlid: data.cntlid,
        vendor: controller.ids.0,
        device: controller.ids.1,
        model: data.model.clone(),
        serial: data.serial.clone(),
        firmware: data.firmware.clone(),
        version: format!("{major}.{minor}.{tertiary}"),
        queue_pairs: pairs,
        queue_pairs_granted: controller.pairs_granted,
        queue_entries: controller.queue_entries(options.io_queue_size),
        queue_entries_max: controller.cap.queue_entries_max(),
        vectors: controller.backing.vectors_count(),
        transfer_bytes_max: data.transfer_bytes_max.unwrap_or(0),
        sgl: data.sgl,
        write_cache: data.write_cache,
        shadow_doorbells: controller.shadow.is_used(),
        quirks: controller.quirks.words(),
        counters: Counters::default(),
        last_error: None,
    }
}

impl<B: PciBacking> NvmeControl for Handle<B> {
    fn info(&self) -> ControllerInfo {
        let counters = self.common.counters();
        let status = self.common.status();
        ControllerInfo {
            state: status.state,
            last_error: status.last_error.clone(),
            shadow_doorbells: self.common.has_shadow(),
            counters,
            ..self.common.fixed.clone()
        }
    }

    fn namespaces(&self) -> Vec<Namespace> {
        let status = self.common.status();
        let whole = |bdev: &Arc<super::bdev::NvmeBdev<B>>| Arc::clone(bdev) as Arc<dyn Bdev>;
        let all = status.namespaces.values();
        all.map(|n| Namespace { info: n.info.clone(), bdev: n.bdev.as_ref().map(whole) }).collect()
    }

    fn owners(&self) -> Option<Vec<ReactorHandle>> {
        self.common.owners.clone()
    }

    fn reset(&self) -> Result<(), NvmeError> {
        self.common.ask(Request::Reset)?
    }

    fn health(&self) -> Result<Health, NvmeError> {
        self.common.ask(Request::Health)?
    }

    fn detach(&self) {
        if self.common.begin_detach() {
            self.common.backing.hurry_up();
            // A thread that has ended has done it already.
            let _ = self.common.ask(Request::Detach);
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

impl<B: PciBacking> Drop for Handle<B> {
    fn drop(&mut self) {
        self.detach();
    }
}
