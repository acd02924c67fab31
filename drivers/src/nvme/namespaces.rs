//! Which namespaces there are, and what becomes of their disks.
//!
//! Flow: attach, event, reset or rescan → ask the device → compare with what is known → new bdevs, sizes, fences → one event.
//! Owner: the controller's thread. **Invariant:** a bdev stands for one namespace for its whole life: what comes back under
//! the same number with another identity or form is another bdev, and the old one reaches the device no more.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use ringmill_core::bdev::Bdev as _;
use uuid::Uuid;

use super::bdev::NvmeBdev;
use super::controller::Controller;
use super::identify::NamespaceData;
use super::joint::{Joint, Namespaced};
use super::quirks::Quirks;
use super::report::NamespaceInfo;
use super::thread::Keeper;
use super::{NvmeError, NvmeEvent};
use crate::pci::PciBacking;

fn hex(bytes: Option<&[u8]>) -> String {
    bytes.unwrap_or_default().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn describe<B: PciBacking>(
    controller: &Controller<B>,
    name: &str,
    (nsid, data): (u32, &NamespaceData),
    seen: &mut HashSet<Uuid>,
) -> NamespaceInfo {
    let of = &controller.data;
    let bogus = controller.quirks.has(Quirks::BOGUS_IDENTITY);
    let mut uuid = data.identity.uuid(&of.serial, &of.model, nsid, bogus);
    if !seen.insert(uuid) {
        // Two of one controller with the same identity: it is made up for the later one.
        uuid = data.identity.uuid(&of.serial, &of.model, nsid, true);
        seen.insert(uuid);
    }
    NamespaceInfo {
        nsid,
        bdev_name: format!("{name}n{nsid}"),
        blocks_count: data.blocks_count,
        block_bytes: data.block_bytes,
        uuid,
        nguid: hex(data.identity.nguid.as_ref().map(|id| &id[..])),
        eui64: hex(data.identity.eui64.as_ref().map(|id| &id[..])),
        read_only: data.read_only,
        refused: data.refusal(),
    }
}

/// What makes it the same disk; its size does not.
fn is_same(one: &NamespaceInfo, other: &NamespaceInfo) -> bool {
    let form = |info: &NamespaceInfo| {
        (info.uuid, info.block_bytes, info.read_only, info.refused.is_some())
    };
    form(one) == form(other)
}

/// Asks the controller and brings the list up to date. True when something changed.
pub(super) fn refresh<B: PciBacking>(
    controller: &mut Controller<B>,
    common: &Arc<Joint<B>>,
) -> Result<bool, NvmeError> {
    let found = controller.namespaces()?;
    let name = &common.options.name;
    let old = common.status().namespaces.clone();
    let (mut seen, mut changed) = (HashSet::new(), false);
    let mut new = BTreeMap::new();
    for (nsid, data) in found {
        let mut info = describe(controller, name, (nsid, &data), &mut seen);
        if !data.described
            && let Some(was) = old.get(&nsid).map(|known| &known.info)
            && (&was.nguid, &was.eui64) == (&info.nguid, &info.eui64)
        {
            // Who it is was said in descriptors, and that question was not answered now: no sign that it is another one.
            info.uuid = was.uuid;
        }
        let known = old.get(&nsid).filter(|known| is_same(&known.info, &info));
        let of = (&controller.data, controller.limits);
        let known = known.filter(|known| known.bdev.as_ref().is_none_or(|b| b.fits(&data, of)));
        let Some(known) = known else {
            changed = true;
            new.insert(nsid, make(controller, common, info, &data));
            continue;
        };
        if known.info.blocks_count != info.blocks_count {
            tracing::info!("{}: {} blocks now", info.bdev_name, info.blocks_count);
        }
        changed |= known.info != info;
        new.insert(nsid, Namespaced { info, bdev: known.bdev.clone() });
    }
    changed |= old.keys().any(|nsid| !new.contains_key(nsid));
    let is_kept = |nsid: &u32, bdev: &Arc<NvmeBdev<B>>| {
        let now = new.get(nsid).and_then(|now| now.bdev.as_ref());
        now.is_some_and(|now| Arc::ptr_eq(now, bdev))
    };
    for (nsid, was) in &old {
        if let Some(bdev) = was.bdev.as_ref().filter(|bdev| !is_kept(nsid, bdev)) {
            tracing::warn!("{}: its namespace is gone, or another one", bdev.info().name());
            bdev.fence();
        }
    }
    common.status().namespaces = new;
    Ok(changed)
}

/// The disk of a namespace, or the reason why there is none.
fn make<B: PciBacking>(
    controller: &Controller<B>,
    common: &Arc<Joint<B>>,
    mut info: NamespaceInfo,
    data: &NamespaceData,
) -> Namespaced<B> {
    let mut bdev = None;
    if info.refused.is_none() {
        match NvmeBdev::new(common, &info, data, (&controller.data, controller.limits)) {
            Ok(made) => bdev = Some(Arc::new(made)),
            Err(error) => info.refused = Some(error.to_string()),
        }
    }
    if let Some(reason) = &info.refused {
        tracing::warn!(
            "{}: namespace {} cannot be a disk: {reason}",
            common.options.name,
            info.nsid
        );
    }
    Namespaced { info, bdev }
}

impl<B: PciBacking> Keeper<B> {
    /// The same, told to whoever attached the controller.
    pub(super) fn refresh_namespaces(&mut self) -> Result<bool, NvmeError> {
        let changed = refresh(&mut self.controller, &self.common)?;
        if changed {
            (self.events)(NvmeEvent::Namespaces);
        }
        Ok(changed)
    }
}
