//! A guest's memory: how its table is built, and who reaches it where the bdev moves data by itself.
//!
//! Flow: a message describes memory → a table → a thread maps what is new of it into the device's domain → the table goes to
//! the workers → when the last of them has given the old one back, a thread unmaps what is gone. Owner: the control thread.
//! **Invariant:** a ring runs only in memory that the device reaches, and what a request in flight may touch stays mapped;
//! memory is mapped for one front-end of a controller at a time, as that pins it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use ringmill_core::mem::{DmaDomain, DmaError, Mapping, MemTable, Region, RegionSpec};

use crate::vhost_user::{Progress, Refusal, RegionDesc};

use super::super::event::{EventKind, NotMapped};
use super::operation::{Kind, Phase};
use super::{FrontEnd, Turn};

/// Refusals of one front-end that are logged: it may try as often as it likes.
const UNMAPPABLE_LOGGED_MAX: u32 = 8;

fn is_of(lost: &Weak<dyn DmaDomain>, domain: &Arc<dyn DmaDomain>) -> bool {
    std::ptr::addr_eq(lost.as_ptr(), Arc::as_ptr(domain))
}

impl FrontEnd {
    /// Where the guest's memory has to be mapped now; `None` where nobody needs that, or nobody may run.
    fn domain(&self) -> Option<Arc<dyn DmaDomain>> {
        let domain = self.bdev.as_ref().filter(|_| self.active)?.dma()?;
        let is_lost = self.lost_domain.as_ref().is_some_and(|lost| is_of(lost, &domain));
        (!is_lost).then_some(domain)
    }

    /// True when rings may run as far as memory is concerned.
    pub(super) fn is_reachable(&self) -> bool {
        !self.mem.lacks_dma() || self.domain().is_none()
    }

    /// True while memory is, or may be, pinned for this front-end.
    pub(in crate::blk) fn holds_memory(&self) -> bool {
        let maps = |phase| matches!(phase, Phase::Map | Phase::Unmap);
        self.mem.has_dma() || self.current.as_ref().is_some_and(|current| maps(current.phase))
    }

    /// Has memory unmapped that no ring needs. True when that is a new operation, which [`FrontEnd::advance`] begins.
    #[must_use]
    pub(in crate::blk) fn let_go(&mut self) -> bool {
        let lets_go = |kind: &Kind| matches!(kind, Kind::UnmapMemory | Kind::Close);
        let current = self.current.as_ref().map(|current| &current.kind);
        let is_new = !current.into_iter().chain(&self.queued).any(lets_go);
        if is_new {
            self.mapping_wanted.store(false, Ordering::Relaxed);
            self.begin(Kind::UnmapMemory);
        }
        is_new
    }

    fn is_letting_go(&self) -> bool {
        self.queued.iter().any(|kind| matches!(kind, Kind::UnmapMemory))
    }

    /// True while memory is mapped for rings that are on no reactor yet, and nothing else is under way.
    pub(super) fn only_maps(&self) -> bool {
        let maps = |kind: &Kind| matches!(kind, Kind::MapMemory);
        self.current.as_ref().is_some_and(|current| maps(&current.kind)) && self.queued.is_empty()
    }

    /// The table of a SET_MEM_TABLE. Front-ends describe all memory again when some of it changes: what a device reaches
    /// already is not mapped, and not pinned, a second time.
    pub(super) fn build_memory(&self, regions: Vec<RegionDesc>) -> Result<MemTable, Refusal> {
        let mut table = MemTable::after(&self.mem);
        for region in regions {
            match self.known_region(&region) {
                Some(known) => table.keep(known)?,
                None => self.add_region(&mut table, &region)?,
            }
        }
        Ok(table)
    }

    fn known_region(&self, region: &RegionDesc) -> Option<&Region> {
        let is_it = |known: &&Region| {
            known.spec() == spec(region)
                && known.mapping().is_of(&region.fd, region.mmap_offset, region.len_bytes)
        };
        self.mem.regions().iter().filter(|_| self.has_domain).find(is_it)
    }

    /// Maps a region into this process and adds it to a table; with slots for registered buffers where it is to be pinned.
    pub(super) fn add_region(
        &self,
        table: &mut MemTable,
        region: &RegionDesc,
    ) -> Result<(), Refusal> {
        let mapping = Mapping::foreign(&region.fd, region.mmap_offset, region.len_bytes)?;
        let (spec, mapping) = (spec(region), Arc::new(mapping));
        match self.registers_memory() {
            true => table.add_to_pin(spec, mapping)?,
            false => table.add(spec, mapping)?,
        };
        Ok(())
    }

    /// Another table is to be in force: at once where neither a ring nor the device knows the present one.
    pub(super) fn change_memory(
        &mut self,
        table: MemTable,
        kind: fn(Arc<MemTable>) -> Kind,
    ) -> Progress {
        let table = Arc::new(table);
        if self.is_busy() || self.mem.has_dma() || self.domain().is_some() {
            // Until its turn comes, it must not keep mapped what others unmap; `map` shares what is mapped then.
            self.begin(kind(Arc::new(table.without_dma())));
            return Progress::Pending;
        }
        self.mem = table;
        self.memory_changed();
        Progress::Done
    }

    /// The phase in which the device is made to reach what it does not of the operation's table.
    pub(super) fn map(&mut self) {
        let (domain, is_closing) = (self.domain(), self.is_closing());
        let Some(operation) = &mut self.current else { return };
        let wanted = match &operation.kind {
            Kind::ReplaceMemory(mem) | Kind::AddMemory(mem) => mem,
            _ => &self.mem,
        };
        let mut table = MemTable::clone(wanted);
        table.share_dma(&self.mem);
        let Some(domain) = domain.filter(|_| table.lacks_dma()) else {
            return self.set_mapped(table);
        };
        operation.waiting = 1;
        let (vid, number) = (self.vid, operation.number);
        let (controller, events) = (self.shared.number, self.shared.events.clone());
        let still = Arc::new(AtomicBool::new(!is_closing));
        self.mapping_wanted = Arc::clone(&still);
        let job = move || {
            let problem = match table.map_into(&domain, || still.load(Ordering::Relaxed)) {
                Ok(true) => None,
                Ok(false) => Some(NotMapped::Refused("nobody needs it any more".to_owned())),
                Err(DmaError::Gone { .. }) => Some(NotMapped::Gone(Arc::downgrade(&domain))),
                Err(error) => Some(NotMapped::Refused(error.to_string())),
            };
            let result = match problem {
                None => Ok(table),
                Some(problem) => {
                    // What was mapped so far goes here, before anybody is told.
                    drop(table);
                    Err(problem)
                }
            };
            events.send(controller, EventKind::Mapped { vid, operation: number, result });
        };
        if let Err(error) = std::thread::Builder::new().name("map-memory".to_owned()).spawn(job) {
            let problem = format!("no thread to map memory: {error}");
            self.on_mapped(number, Err(NotMapped::Refused(problem)));
        }
    }

    /// The operation goes on with this table.
    fn set_mapped(&mut self, table: MemTable) {
        match self.current.as_mut().map(|current| &mut current.kind) {
            Some(Kind::ReplaceMemory(mem) | Kind::AddMemory(mem)) => *mem = Arc::new(table),
            _ => self.mem = Arc::new(table),
        }
    }

    /// The thread is done.
    pub(in crate::blk) fn on_mapped(&mut self, number: u64, result: Result<MemTable, NotMapped>) {
        if let Err(NotMapped::Gone(domain)) = &result {
            // It reaches nothing any more, so that rings may run in any memory: what they are given ends with errors, at the
            // latest when the bdev goes, which will be told.
            self.lost_domain = Some(Weak::clone(domain));
        }
        let is_needed = self.domain().is_some();
        let Some(current) = self.current.as_mut().filter(|c| c.number == number) else { return };
        current.waiting = 0;
        match result {
            Ok(table) => self.set_mapped(table),
            Err(_) if !is_needed => self.put_off(),
            Err(problem) => {
                let problem = problem.to_string();
                let says_so = matches!(current.kind, Kind::MapMemory);
                self.unmappable_count += 1;
                if !says_so && self.unmappable_count <= UNMAPPABLE_LOGGED_MAX {
                    tracing::error!(
                        controller = %self.shared.name, session = self.vid,
                        "memory of the guest is refused: {problem}"
                    );
                }
                current.problem = Some(problem);
            }
        }
    }

    /// The device need not reach the memory any more: the operation begins anew and maps nothing then. Rings that still have
    /// the bdev let go of it first, as they may only run in memory that it reaches.
    fn put_off(&mut self) {
        let Some(operation) = self.current.take() else { return };
        let loses = matches!(self.queued.front(), Some(Kind::LoseBdev));
        self.queued.insert(usize::from(loses), operation.kind);
    }

    /// What follows after memory was mapped for rings that wait.
    pub(super) fn mapped_or_not(&mut self, problem: Option<String>) -> Turn {
        match problem {
            Some(_) if self.is_closing() || self.is_letting_go() => Turn::Nothing,
            Some(problem) => Turn::SendAway(problem),
            None => {
                self.start_rings();
                Turn::Nothing
            }
        }
    }

    /// The phase in which the device is kept from what it reached: no ring can name it any more.
    pub(super) fn unmap(&mut self) {
        let Some(operation) = &mut self.current else { return };
        let new = match &operation.kind {
            Kind::ReplaceMemory(mem) => Arc::clone(mem),
            Kind::Close => Arc::new(MemTable::new()),
            _ => Arc::new(self.mem.without_dma()),
        };
        let old = std::mem::replace(&mut self.mem, new);
        if !old.has_dma_beyond(&self.mem) {
            return;
        }
        operation.waiting = 1;
        let (vid, operation) = (self.vid, operation.number);
        let (controller, events) = (self.shared.number, self.shared.events.clone());
        let job = move || {
            drop(old);
            events.send(controller, EventKind::Unmapped { vid, operation });
        };
        if std::thread::Builder::new().name("unmap-memory".to_owned()).spawn(job).is_err() {
            // The job went unrun, and the memory with it.
            self.on_unmapped(operation);
        }
    }

    /// The thread is done.
    pub(in crate::blk) fn on_unmapped(&mut self, number: u64) {
        if let Some(current) = self.current.as_mut().filter(|c| c.number == number) {
            current.waiting = 0;
        }
    }
}

fn spec(region: &RegionDesc) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_addr,
        len_bytes: region.len_bytes,
        user_addr: region.user_addr.0,
    }
}
