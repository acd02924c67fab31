//! A namespace as a block device.
//!
//! Flow: the controller's thread makes one per sound namespace → channels of it find their reactor's queue pair, or bring it
//! along. Owner: control threads. **Invariant:** all memory that a channel may name, bounce buffers included, is reachable for
//! the device before the channel is opened.

use std::sync::{Arc, Mutex};

use ringmill_core::bdev::{
    AlignChannel, Alignment, Bdev, BdevError, BdevInfo, BlockLocks, ChannelSeed, Geometry,
};
use ringmill_core::limits::SECTOR_BYTES;
use ringmill_core::mem::DmaDomain;
use ringmill_core::reactor::{DeviceQueue, ReactorHandle};

use super::channel::NvmeChannel;
use super::identify::{ControllerData, NamespaceData, SetLimits};
use super::joint::{Joint, Request, Waiting};
use super::report::NamespaceInfo;
use super::{NamespaceShape, NvmeError};
use crate::GateChannel;
use crate::pci::PciBacking;

/// What commands to a namespace must look like now.
fn shape(
    info: &Arc<BdevInfo>,
    nsid: u32,
    data: &NamespaceData,
    (controller, limits): (&ControllerData, SetLimits),
) -> NamespaceShape {
    NamespaceShape {
        info: Arc::clone(info),
        nsid,
        block_shift: data.block_bytes.trailing_zeros(),
        transfer_bytes_max: controller.command_bytes_max(),
        boundary_bytes: data.boundary_bytes(controller),
        sgl: controller.sgl,
        write_cache: controller.write_cache,
        discard: controller.discard.then(|| limits.discard()),
        write_zeroes: controller.write_zeroes.then(|| data.write_zeroes(controller, limits)),
    }
}

/// A namespace.
#[derive(Debug)]
pub(super) struct NvmeBdev<B: PciBacking> {
    info: Arc<BdevInfo>,
    shape: Arc<NamespaceShape>,
    rules: Alignment,
    locks: Option<Arc<BlockLocks>>,
    common: Arc<Joint<B>>,
}

impl<B: PciBacking> NvmeBdev<B> {
    /// A bdev for a namespace that was not refused.
    pub(super) fn new(
        common: &Arc<Joint<B>>,
        namespace: &NamespaceInfo,
        data: &NamespaceData,
        (controller, limits): (&ControllerData, SetLimits),
    ) -> Result<NvmeBdev<B>, BdevError> {
        let block_bytes = data.block_bytes;
        let geometry = Geometry {
            block_bytes,
            physical_block_bytes: data.physical_block_bytes(),
            optimal_io_bytes: data.optimal_io_bytes(controller),
            blocks_count: data.blocks_count,
            read_only: data.read_only,
            write_cache: controller.write_cache,
            discard: controller.discard,
            discard_granularity_bytes: data.discard_granularity_bytes(),
            write_zeroes: controller.write_zeroes,
        };
        let uuid = Some(namespace.uuid);
        let info = Arc::new(BdevInfo::new(&namespace.bdev_name, uuid, "NVMe disk", geometry)?);
        let shape = shape(&info, namespace.nsid, data, (controller, limits));
        Ok(NvmeBdev {
            info,
            rules: shape.alignment(),
            shape: Arc::new(shape),
            // Smaller blocks than a guest's sectors there are none, so no write is part of a block.
            locks: (block_bytes > SECTOR_BYTES).then(|| Arc::new(BlockLocks::default())),
            common: Arc::clone(common),
        })
    }

    /// Whether commands that are made for it are still right, after a reset into another firmware, say.
    pub(super) fn fits(&self, data: &NamespaceData, of: (&ControllerData, SetLimits)) -> bool {
        self.shape.still_holds(&shape(&self.info, self.shape.nsid, data, of))
    }

    /// No request reaches the device any more: the namespace is another one now, or none.
    pub(super) fn fence(&self) {
        self.info.fence();
    }

    /// The pair that a channel brings along, if its reactor does not have it yet.
    fn waiting(&self, home: Option<&ReactorHandle>) -> Result<Waiting<B>, BdevError> {
        let Some(home) = home else {
            let pair = self.common.ask(Request::Pair).and_then(|pair| pair);
            let pair = pair.map_err(|error: NvmeError| self.refused(error))?;
            return Ok(Arc::new(Mutex::new(Some(pair))));
        };
        let own = self.common.homes.iter().find(|pair| pair.reactor.same(home));
        own.map(|own| Arc::clone(&own.waiting)).ok_or_else(|| {
            self.refused("this reactor has no queue pair of its controller; requests must cross")
        })
    }

    fn refused(&self, reason: impl ToString) -> BdevError {
        BdevError::Refused { name: self.info.name().to_owned(), reason: reason.to_string() }
    }
}

impl<B: PciBacking> Bdev for NvmeBdev<B> {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let common = &self.common;
        let (waiting, commands_max) = (self.waiting(home)?, common.fixed.queue_entries - 1);
        let mut channel = NvmeChannel::<B::Registers>::new(&self.shape, commands_max);
        let (key, info) = (common.key, Arc::clone(&self.info));
        let (rules, locks) = (self.rules, self.locks.clone());
        Ok(Box::new(move |io| {
            let slot = match io.devices.find(key) {
                Some(slot) => slot,
                None => {
                    let pair = waiting.lock().ok().and_then(|mut waiting| waiting.take());
                    let Some(pair) = pair else {
                        let reason = "its controller was detached".to_owned();
                        return Err(BdevError::Refused { name: info.name().to_owned(), reason });
                    };
                    let pair: Box<dyn DeviceQueue> = Box::new(pair);
                    io.devices.insert(key, pair)
                }
            };
            channel.join(io, slot)?;
            Ok(Box::new(GateChannel::new(AlignChannel::new(channel, rules, locks), info)))
        }))
    }

    fn dma(&self) -> Option<Arc<dyn DmaDomain>> {
        Some(Arc::clone(&self.common.domain))
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        let asked = self.common.ask(Request::Rescan).and_then(|answer| answer);
        asked.map_err(|error| self.refused(error))?;
        let status = self.common.status();
        let found = status.namespaces.get(&self.shape.nsid);
        found
            .filter(|n| n.bdev.as_ref().is_some_and(|b| Arc::ptr_eq(&b.info, &self.info)))
            .map(|namespace| namespace.info.blocks_count)
            .ok_or_else(|| self.refused("its namespace is gone; delete the disk"))
    }

    fn driver_facts(&self) -> Vec<(&'static str, String)> {
        let fixed = &self.common.fixed;
        let (counters, pairs) = (self.common.counters(), self.common.pair_counters());
        let state = self.common.status().state.as_str();
        vec![
            ("controller", fixed.name.clone()),
            ("pci_address", fixed.address.clone()),
            ("nsid", self.shape.nsid.to_string()),
            ("state", state.to_owned()),
            ("model", fixed.model.clone()),
            ("serial", fixed.serial.clone()),
            ("firmware", fixed.firmware.clone()),
            ("queue_pairs", fixed.queue_pairs.to_string()),
            ("queue_entries", fixed.queue_entries.to_string()),
            ("transfer_bytes_max", self.shape.transfer_bytes_max.to_string()),
            ("boundary_bytes", self.shape.boundary_bytes.to_string()),
            ("sgl", self.shape.sgl.to_string()),
            ("shadow_doorbells", self.common.has_shadow().to_string()),
            ("memory_alignment_bytes", self.rules.address_bytes.to_string()),
            ("commands", pairs.commands.to_string()),
            ("doorbells", pairs.doorbells.to_string()),
            ("split_requests", pairs.splits.to_string()),
            ("errors", pairs.errors.to_string()),
            ("retries", counters.retries.to_string()),
            ("timeouts", counters.timeouts.to_string()),
            ("resets", counters.resets.to_string()),
            ("stale", counters.stale.to_string()),
        ]
    }
}
