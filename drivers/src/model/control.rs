//! The test's hand on a model: faults, namespaces, news, counters. Thread-safe; every call is done when it returns.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringmill_core::spec::nvme::{cc, event, health, log, reg};

use super::counters::{Count, Counters};
use super::dma::{MapFailure, ModelDomain};
use super::faults::{Aborts, Action, Match};
use super::lies::Lie;
use super::link::{Link, lock};
use super::machine::Machine;
use super::namespace::Namespace;
use super::options::ModelNamespace;
use crate::pci::DeviceNews;

/// A handle. It may outlive the controller; its calls do nothing then, and the counters stay.
#[derive(Clone, Debug)]
pub struct ModelControl {
    pub(super) link: Arc<Link>,
    pub(super) domain: Arc<ModelDomain>,
}

impl ModelControl {
    fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Machine) -> R + Send + 'static,
    ) -> Option<R> {
        self.link.call(work)
    }

    /// What was seen.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.link.counters
    }

    /// One counter.
    #[must_use]
    pub fn count(&self, count: Count) -> u64 {
        self.link.counters.get(count)
    }

    /// The first violation of the specification by the driver, or that it touched memory that was not mapped. Tests end
    /// with `assert_eq!(control.complaint(), None)`.
    #[must_use]
    pub fn complaint(&self) -> Option<String> {
        let counters = &self.link.counters;
        let theft = || Some(format!("memory taken away: {}", counters.first_theft()?));
        let fault = || Some(format!("access to unmapped memory: {}", counters.first_fault()?));
        counters.first_protocol_error().or_else(theft).or_else(fault)
    }

    /// How often it has lied about something.
    #[must_use]
    pub fn lies(&self, about: Lie) -> u64 {
        self.link.lies.as_ref().map_or(0, |lies| lock(lies).told(about))
    }

    /// Has `action` happen to the commands that `what` describes, after all rules that there are.
    pub fn rule(&self, what: Match, action: Action) {
        self.call(move |machine| machine.faults.add(what, action));
    }

    /// Forgets all rules. Commands that are held remain so.
    pub fn clear_rules(&self) {
        self.call(|machine| machine.faults.clear_rules());
    }

    /// Answers swallowed and delayed commands now.
    pub fn release_held(&self) {
        self.call(|machine| {
            for mut command in std::mem::take(&mut machine.held.odd) {
                command.due_ns = 0;
                machine.held.add_odd(command);
            }
        });
    }

    /// Commands that are out.
    #[must_use]
    pub fn held(&self) -> usize {
        self.call(|machine| machine.held.len()).unwrap_or(0)
    }

    /// How aborts end from now on.
    pub fn set_aborts(&self, aborts: Aborts) {
        self.call(move |machine| machine.faults.aborts = aborts);
    }

    /// CSTS.RDY stays as it is, and a controller that is ready goes on whatever CC says; or it obeys again.
    pub fn set_ready_stuck(&self, is_stuck: bool) {
        self.call(move |machine| {
            machine.faults.ready_is_stuck = is_stuck;
            let control = machine.link.bar.load_u32(reg::CC, Ordering::Acquire);
            if !is_stuck && control & cc::EN == 0 {
                // What it did not listen to.
                machine.disable();
            }
        });
    }

    /// A shutdown is never complete, or is again.
    pub fn set_shutdown_stuck(&self, is_stuck: bool) {
        self.call(move |machine| machine.faults.shutdown_is_stuck = is_stuck);
    }

    /// Function resets fail, or work again.
    pub fn set_reset_fails(&self, fails: bool) {
        self.call(move |machine| machine.faults.reset_fails = fails);
    }

    /// Offers doorbells in memory from the next identify on, or does not.
    pub fn set_doorbell_buffer(&self, is_offered: bool) {
        self.call(move |machine| machine.options.doorbell_buffer = is_offered);
    }

    /// At most so many I/O queues are granted.
    pub fn set_queues_granted(&self, count: u16) {
        self.call(move |machine| machine.faults.queues_max = count);
    }

    /// Lets so many maps succeed and all further ones fail; `None`: none fails.
    pub fn fail_dma_maps(&self, after: Option<(u32, MapFailure)>) {
        self.domain.fail_after(after);
    }

    /// Mappings that the device reaches.
    #[must_use]
    pub fn mapped_count(&self) -> usize {
        self.domain.regions_count()
    }

    /// What every further I/O command takes at least.
    pub fn set_latency(&self, latency: Duration) {
        self.call(move |machine| machine.options.latency = latency);
    }

    /// CSTS.CFS now.
    pub fn fail(&self) {
        self.call(Machine::fail);
    }

    /// The device is pulled out: registers read as ones, nothing is answered. `tells`: with news.
    pub fn vanish(&self, tells: bool) {
        self.link.gone.store(true, Ordering::Release);
        self.call(Machine::vanish);
        if tells {
            self.link.tell(DeviceNews::Gone);
        }
    }

    /// News for the driver.
    pub fn tell(&self, news: DeviceNews) {
        self.link.tell(news);
    }

    /// Power fails and comes back: what was not flushed is lost, the controller is as after power on.
    pub fn power_cut(&self) {
        self.call(|machine| {
            machine.namespaces.iter().for_each(|ns| ns.what.medium.power_cut());
            machine.reset();
        });
    }

    /// Adds a namespace, or attaches one that was detached again.
    pub fn attach_namespace(&self, what: ModelNamespace) {
        self.call(move |machine| {
            let nsid = what.nsid;
            machine.namespaces.retain(|ns| ns.what.nsid != nsid);
            machine.namespaces.push(Namespace::new(what));
            machine.namespace_changed(nsid);
        });
    }

    /// Detaches a namespace.
    pub fn detach_namespace(&self, nsid: u32) {
        self.change(nsid, |ns| ns.is_attached = false);
    }

    /// Changes a namespace's size.
    pub fn resize_namespace(&self, nsid: u32, blocks_count: u64) {
        self.change(nsid, move |ns| ns.what.blocks_count = blocks_count);
    }

    /// Write protects it, or no longer.
    pub fn protect_namespace(&self, nsid: u32, read_only: bool) {
        self.change(nsid, move |ns| ns.what.read_only = read_only);
    }

    fn change(&self, nsid: u32, change: impl FnOnce(&mut Namespace) + Send + 'static) {
        self.call(move |machine| {
            if let Some(ns) = machine.namespaces.iter_mut().find(|ns| ns.what.nsid == nsid) {
                change(ns);
                machine.namespace_changed(nsid);
            }
        });
    }

    /// Changes what SMART says, with an event if a warning is new.
    pub fn set_health(&self, critical_warning: u8, temperature_kelvin: u16) {
        self.call(move |machine| {
            let page = &mut machine.admin.health;
            let new_warnings = critical_warning & !page[health::CRITICAL_WARNING];
            page[health::CRITICAL_WARNING] = critical_warning;
            let at = health::TEMPERATURE;
            page[at..at + 2].copy_from_slice(&temperature_kelvin.to_le_bytes());
            if new_warnings != 0 {
                // Information: 0 reliability, 1 temperature, 2 spare.
                let info = match new_warnings.trailing_zeros() {
                    0 => 2,
                    1 => 1,
                    _ => 0,
                };
                let enabled_by = u32::from(new_warnings);
                machine.tell_event(event::HEALTH, info, log::HEALTH, enabled_by);
            }
        });
    }

    /// True once a write to a doorbell or register would find nobody.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.link.is_gone()
    }
}
