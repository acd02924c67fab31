//! The data path on the device model: the conformance suite over every way to point to data, and faults.
//!
//! Here a pair is brought up by hand, without the controller's thread.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringmill_core::IoStatus;
use ringmill_core::bdev::conformance::{Suite, TestBed};
use ringmill_core::bdev::{
    AlignChannel, Bdev, BdevError, BdevInfo, BlockLocks, ChannelSeed, Geometry,
};
use ringmill_core::io::{IoFlags, IoOp};
use ringmill_core::mem::DmaDomain;
use ringmill_core::reactor::{DeviceKey, ReactorHandle};
use ringmill_core::spec::nvme::{Status, nvm, status};
use rustix::event::{EventfdFlags, eventfd};

use super::super::controller::Controller;
use super::super::parts::{
    DiscardLimits, Interrupts, NamespaceShape, QueueMemory, QueuePairParts, WriteZeroesLimits,
};
use super::super::shared::{Order, QueueShared, Trouble};
use super::super::{NvmeChannel, NvmeOptions, QueuePair};
use crate::GateChannel;
use crate::model::{
    Action, Count, Match, Medium, ModelBacking, ModelControl, ModelNamespace, ModelOptions,
    ModelRegisters, Sgls, start,
};
use crate::pci::{CancelToken, PciBacking};

/// A namespace of the model as a bdev whose channels have a pair each.
struct OnModel {
    info: Arc<BdevInfo>,
    shape: NamespaceShape,
    locks: Arc<BlockLocks>,
    domain: Arc<dyn DmaDomain>,
    controller: Mutex<Controller<ModelBacking>>,
    control: ModelControl,
    next: AtomicU16,
    entries: u16,
    pairs: Mutex<Vec<(Arc<QueueShared>, Arc<QueueMemory>)>>,
}

#[derive(Clone, Copy)]
struct Like {
    block_shift: u8,
    sgls: Sgls,
    mdts: u8,
    noiob: u16,
    entries: u16,
    shadow: bool,
    ranges_max: u8,
    zeroes_max: u8,
}

impl Default for Like {
    fn default() -> Like {
        Like {
            block_shift: 9,
            sgls: Sgls::None,
            mdts: 5,
            noiob: 0,
            entries: 256,
            shadow: false,
            ranges_max: 0,
            zeroes_max: 0,
        }
    }
}

const BYTES: u64 = 16 << 20;

impl OnModel {
    #[expect(clippy::field_reassign_with_default, reason = "the options have a private field")]
    fn new(like: Like) -> Arc<OnModel> {
        let mut options = ModelOptions::default();
        options.mdts = like.mdts;
        options.sgls = like.sgls;
        options.doorbell_buffer = like.shadow;
        options.dsm_ranges_max = like.ranges_max;
        options.write_zeroes_max = like.zeroes_max;
        let medium = Medium::ram(BYTES).unwrap();
        let blocks_count = BYTES >> like.block_shift;
        let mut namespace = ModelNamespace::new(1, like.block_shift, blocks_count, medium);
        namespace.noiob = like.noiob;
        let (backing, control) = start(options, vec![namespace]).unwrap();
        let domain = backing.dma();
        let backing = Arc::new(backing);
        let (options, token) = (NvmeOptions::default(), CancelToken::default());
        let mut controller = Controller::open(backing, &options, 16, &token).unwrap();
        assert_eq!(controller.ask_for_pairs(16).unwrap(), 16);
        if like.shadow {
            controller.set_up_shadow(16).unwrap();
        }
        let block_bytes = 1 << like.block_shift;
        let geometry = Geometry {
            block_bytes,
            physical_block_bytes: block_bytes,
            optimal_io_bytes: 0,
            blocks_count,
            read_only: false,
            write_cache: true,
            discard: true,
            discard_granularity_bytes: block_bytes,
            write_zeroes: true,
        };
        let info = Arc::new(BdevInfo::new("model", None, "NVMe disk", geometry).unwrap());
        let ranges_max = if like.ranges_max == 0 { 256 } else { u16::from(like.ranges_max) };
        let blocks_max = match like.zeroes_max {
            0 => 1 << 16,
            most => (4096u32 << most) >> like.block_shift,
        };
        let shape = NamespaceShape {
            info: Arc::clone(&info),
            nsid: 1,
            block_shift: u32::from(like.block_shift),
            transfer_bytes_max: 4096 << like.mdts,
            boundary_bytes: u32::from(like.noiob) << like.block_shift,
            sgl: like.sgls != Sgls::None,
            write_cache: true,
            discard: Some(DiscardLimits {
                ranges_max,
                range_blocks_max: u32::MAX,
                blocks_max: u64::MAX,
            }),
            write_zeroes: Some(WriteZeroesLimits { blocks_max, deallocate: true }),
        };
        Arc::new(OnModel {
            info,
            shape,
            locks: Arc::new(BlockLocks::default()),
            domain,
            controller: Mutex::new(controller),
            control,
            next: AtomicU16::new(1),
            entries: like.entries,
            pairs: Mutex::default(),
        })
    }

    fn check(&self) {
        let counters = self.control.counters();
        assert_eq!(counters.first_protocol_error(), None);
        for count in [Count::ProtocolErrors, Count::DmaFaults] {
            assert_eq!(self.control.count(count), 0, "{count:?}");
        }
    }
}

impl Bdev for OnModel {
    fn info(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    fn open_channel(&self, _home: Option<&ReactorHandle>) -> Result<ChannelSeed, BdevError> {
        let queue_id = self.next.fetch_add(1, Ordering::Relaxed);
        let memory = Arc::new(QueueMemory::new(&self.domain, self.entries).unwrap());
        let mut controller = self.controller.lock().unwrap();
        controller.create_pair(queue_id, &memory, None).unwrap();
        let (sq_doorbell_bytes, cq_doorbell_bytes) = controller.doorbells(queue_id);
        let nudge = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let shared = Arc::new(QueueShared::new(nudge));
        shared.order(Order::Run);
        self.pairs.lock().unwrap().push((Arc::clone(&shared), Arc::clone(&memory)));
        let parts = QueuePairParts {
            key: DeviceKey(1),
            queue_id,
            memory,
            registers: Arc::clone(controller.bar.registers()),
            sq_doorbell_bytes,
            cq_doorbell_bytes,
            shadow: controller.shadow_of(queue_id),
            interrupts: Interrupts::None,
            shared,
            timeout_ns: 0,
        };
        let pair = QueuePair::new(parts).unwrap();
        let mut channel = NvmeChannel::<ModelRegisters>::new(&self.shape, self.entries - 1);
        let (info, locks) = (Arc::clone(&self.info), Arc::clone(&self.locks));
        let rules = self.shape.alignment();
        Ok(Box::new(move |io| {
            let slot = io.devices.insert(DeviceKey(1), Box::new(pair));
            channel.join(io, slot)?;
            let locks = (rules.block_bytes > 512).then_some(locks);
            Ok(Box::new(GateChannel::new(AlignChannel::new(channel, rules, locks), info)))
        }))
    }

    fn dma(&self) -> Option<Arc<dyn DmaDomain>> {
        Some(Arc::clone(&self.domain))
    }
}

fn conforms(like: Like) -> Arc<OnModel> {
    let bdev = OnModel::new(like);
    let mut suite = Suite::new(Arc::<OnModel>::clone(&bdev));
    suite.requests_count = 1500;
    suite.run();
    bdev.check();
    bdev
}

#[test]
fn conforms_with_prps() {
    let bdev = conforms(Like::default());
    assert!(bdev.control.count(Count::Prp) > 0 && bdev.control.count(Count::Sgl) == 0);
}

#[test]
fn conforms_with_sgls_and_doorbells_in_memory() {
    let bdev = conforms(Like { sgls: Sgls::Dwords, shadow: true, ..Like::default() });
    assert!(bdev.control.count(Count::Sgl) > 0);
}

#[test]
fn conforms_with_blocks_of_4096_and_a_boundary() {
    conforms(Like { block_shift: 12, noiob: 24, sgls: Sgls::Bytes, ..Like::default() });
}

#[test]
fn conforms_with_the_smallest_of_everything() {
    conforms(Like {
        block_shift: 12,
        mdts: 1,
        noiob: 3,
        entries: 4,
        ranges_max: 1,
        zeroes_max: 1,
        ..Like::default()
    });
}

#[test]
fn transfers_cross_no_boundary_and_zeroes_may() {
    let bdev = OnModel::new(Like { noiob: 24, ..Like::default() });
    let mut bed = TestBed::new(&*bdev);
    for op in [IoOp::Write, IoOp::Read] {
        assert_eq!(run(&mut bed, op, 5 * 512, 300 << 10), IoStatus::Ok);
    }
    assert_eq!(bdev.control.count(Count::BoundaryCrossings), 0);
    assert!(bdev.control.counters().io(nvm::READ) >= 25);
    assert_eq!(run(&mut bed, IoOp::WriteZeroes, 5 * 512, 300 << 10), IoStatus::Ok);
    assert_eq!(bdev.control.counters().io(nvm::WRITE_ZEROES), 1);
    bed.finish();
    bdev.check();
}

/// Runs a request, with errors that pass on the way.
fn run(bed: &mut TestBed, op: IoOp, at: u64, len: u64) -> IoStatus {
    let list: Vec<_> = match op.has_data() {
        true => vec![bed.segment(0, 0, usize::try_from(len).unwrap())],
        false => Vec::new(),
    };
    bed.run(op, IoFlags::NONE, at, len, &list)
}

#[test]
fn statuses_reach_the_guest_or_pass() {
    let bdev = OnModel::new(Like::default());
    let mut bed = TestBed::new(&*bdev);
    let control = &bdev.control;
    let not_ready = Status(status::NAMESPACE_NOT_READY);
    control.rule(Match::io(nvm::WRITE).times(2), Action::Status(not_ready));
    assert_eq!(run(&mut bed, IoOp::Write, 0, 4096), IoStatus::Ok);
    // Done, and said not to be: doing it again does no harm.
    let internal = Status(status::INTERNAL_ERROR);
    control.rule(Match::any_io().once(), Action::ExecuteThenStatus(internal));
    assert_eq!(run(&mut bed, IoOp::Write, 4096, 4096), IoStatus::Ok);
    control.clear_rules();
    let bad = Status(status::UNRECOVERED_READ);
    control.rule(Match::io(nvm::READ).on(8..9), Action::Status(bad));
    assert_eq!(run(&mut bed, IoOp::Read, 4096, 4096), IoStatus::Medium);
    assert_eq!(run(&mut bed, IoOp::Read, 0, 256 << 10), IoStatus::Medium, "one part of many");
    assert_eq!(run(&mut bed, IoOp::Read, 8192, 256 << 10), IoStatus::Ok);
    assert_eq!(control.counters().io(nvm::FLUSH), 0);
    assert_eq!(run(&mut bed, IoOp::Flush, 0, 0), IoStatus::Ok);
    assert_eq!(control.counters().io(nvm::FLUSH), 1);
    bed.finish();
    bdev.check();
}

#[test]
fn nonsense_is_survived_by_a_reset() {
    let nonsense = [
        Action::CompleteTwice,
        Action::OtherCid(1 << 12),
        Action::StrayCid(77),
        Action::SqHead(0xfff),
        Action::SqId(9),
        Action::GarbageRing,
    ];
    for action in nonsense {
        let bdev = OnModel::new(Like { entries: 32, ..Like::default() });
        let mut bed = TestBed::new(&*bdev);
        let what = Match::io(nvm::READ).after(3);
        // Garbage is seen only where the driver looks before a completion lies there; half of it shows the other phase.
        let again_and_again = matches!(action, Action::GarbageRing);
        bdev.control.rule(if again_and_again { what } else { what.once() }, action);
        let (shared, memory) = bdev.pairs.lock().unwrap()[0].clone();
        bed.turn(|_, _| ());
        for arena in 0..20 {
            let list = [bed.segment(arena, 0, 4096)];
            assert!(bed.offer(IoOp::Read, IoFlags::NONE, 0, 4096, &list).is_some());
        }
        let since = Instant::now();
        let mut ended = 0;
        while shared.trouble().is_none() {
            ended += bed.turn(|_, status| assert!(status.is_ok()));
            // A second completion of a reused slot needs traffic to be noticed.
            if ended > 0 && bed.out_count() < 8 {
                let list = [bed.segment(0, 0, 4096)];
                let _ = bed.offer(IoOp::Read, IoFlags::NONE, 0, 4096, &list);
            }
            assert!(since.elapsed() < Duration::from_secs(20), "{action:?}");
        }
        assert!(matches!(shared.trouble(), Some(Trouble::StrangeCid | Trouble::StrangeHead)));
        bdev.control.clear_rules();
        // What the controller's thread would do.
        let obey = |bed: &mut TestBed, order| {
            shared.order(order);
            while !shared.is_obeyed() {
                bed.turn(|_, status| assert!(status.is_ok()));
            }
        };
        obey(&mut bed, Order::Hold);
        let mut controller = bdev.controller.lock().unwrap();
        controller.halt(Duration::from_secs(5)).unwrap();
        obey(&mut bed, Order::Disabled);
        controller.enable().unwrap();
        controller.ask_for_pairs(16).unwrap();
        controller.create_pair(1, &memory, None).unwrap();
        drop(controller);
        obey(&mut bed, Order::Run);
        while bed.out_count() > 0 {
            bed.turn(|_, status| assert!(status.is_ok(), "{action:?}"));
            assert!(since.elapsed() < Duration::from_secs(20), "{action:?}");
        }
        assert_eq!(run(&mut bed, IoOp::Read, 0, 1 << 20), IoStatus::Ok, "{action:?}");
        bed.finish();
    }
}
