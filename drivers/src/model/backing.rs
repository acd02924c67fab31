//! The model as a PCI device: [`PciBacking`] over the shared link, and the thread's life.
//!
//! Flow: [`start`] makes the thread → a driver works through the backing, a test through the [`ModelControl`] → `close`
//! (or dropping the backing) ends the thread. Owner: control threads. **Invariant:** after `close` and after a successful
//! `reset` the thread touches no memory of the driver: both wait for it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ringmill_core::mem::DmaDomain;
use ringmill_core::units::usize_of;

use super::config_space::{CONFIG_BYTES, config_space};
use super::control::ModelControl;
use super::dma::ModelDomain;
use super::lies::Lie;
use super::link::{Link, ModelRegisters, lock};
use super::machine::Machine;
use super::options::{ModelNamespace, ModelOptions, Vectors};
use crate::pci::{DeviceNews, PciBacking, PciError};

/// A controller in software.
#[derive(Debug)]
pub struct ModelBacking {
    link: Arc<Link>,
    domain: Arc<ModelDomain>,
    options: ModelOptions,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Starts a controller. It lives as long as the backing.
///
/// # Errors
/// When the system gives no memory or no thread.
pub fn start(
    options: ModelOptions,
    namespaces: Vec<ModelNamespace>,
) -> Result<(ModelBacking, ModelControl), Box<dyn std::error::Error>> {
    start_with_lies(options, namespaces, None)
}

/// The same; with lies that follow from these bytes.
pub(super) fn start_with_lies(
    options: ModelOptions,
    namespaces: Vec<ModelNamespace>,
    lies: Option<&[u8]>,
) -> Result<(ModelBacking, ModelControl), Box<dyn std::error::Error>> {
    let link = Arc::new(Link::new(&options, lies)?);
    let domain = Arc::new(ModelDomain::new(&link, options.iova_offset));
    let (for_thread, for_machine) = (Arc::clone(&link), options.clone());
    let core = options.core;
    let thread =
        std::thread::Builder::new().name(format!("model-{}", options.name)).spawn(move || {
            if let Some(core) = core {
                let mut set = rustix::thread::CpuSet::new();
                set.set(core);
                // Elsewhere it is slower, not wrong.
                let _ = rustix::thread::sched_setaffinity(None, &set);
            }
            Machine::new(for_thread, for_machine, namespaces).run();
        })?;
    // Registers are there once the thread answers.
    link.call(|_| ()).ok_or("the model's thread has ended")?;
    let control = ModelControl { link: Arc::clone(&link), domain: Arc::clone(&domain) };
    Ok((ModelBacking { link, domain, options, thread: Mutex::new(Some(thread)) }, control))
}

impl ModelBacking {
    /// For the vfio-user server, which maps where its client says.
    pub(super) fn domain(&self) -> &ModelDomain {
        &self.domain
    }

    /// Changes what configuration space says, seldom.
    pub(super) fn lie_about(&self, config: &mut [u8]) {
        if let Some(lies) = &self.link.lies {
            lock(lies).data(config, Lie::Config);
        }
    }

    /// The kind of interrupts.
    pub(super) fn vectors_mode(&self) -> Vectors {
        self.link.vectors_mode
    }

    fn gone(&self) -> PciError {
        PciError::Gone { device: self.link.name.clone() }
    }

    fn refused(&self, reason: String) -> PciError {
        PciError::Refused { device: self.link.name.clone(), reason }
    }

    /// Runs `work` on the thread unless the device is gone.
    fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Machine) -> R + Send + 'static,
    ) -> Result<R, PciError> {
        if self.link.is_gone() {
            return Err(self.gone());
        }
        self.link.call(work).ok_or_else(|| self.gone())
    }
}

impl PciBacking for ModelBacking {
    type Registers = ModelRegisters;

    fn name(&self) -> &str {
        &self.link.name
    }

    fn dma(&self) -> Arc<dyn DmaDomain> {
        Arc::clone(&self.domain) as Arc<dyn DmaDomain>
    }

    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<ModelRegisters>, PciError> {
        if self.link.is_gone() {
            return Err(self.gone());
        }
        let len_bytes = self.link.bar.len_bytes();
        if bar != 0 || len_bytes_min > len_bytes {
            return Err(self.refused(format!("BAR {bar} has no {len_bytes_min} bytes")));
        }
        Ok(Arc::new(ModelRegisters { link: Arc::clone(&self.link) }))
    }

    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError> {
        let is_master = self.call(|machine| machine.is_master)?;
        let space = config_space(&self.options, is_master);
        let inside = offset_bytes.checked_add(into.len() as u64);
        if inside.is_none_or(|end| end > CONFIG_BYTES as u64) {
            return Err(self.refused(format!("no configuration space at {offset_bytes:#x}")));
        }
        let start = usize_of(offset_bytes);
        into.copy_from_slice(&space[start..start + into.len()]);
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        self.call(move |machine| machine.set_master(on))
    }

    fn reset(&self) -> Result<(), PciError> {
        let did = self.call(|machine| {
            if machine.faults.reset_fails {
                return false;
            }
            machine.reset();
            true
        })?;
        did.then_some(()).ok_or_else(|| PciError::Io {
            device: self.link.name.clone(),
            what: "the function cannot be reset".to_owned(),
            source: std::io::Error::from_raw_os_error(libc::EIO),
        })
    }

    fn vectors_count(&self) -> u16 {
        self.link.vectors_count()
    }

    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        if self.link.is_gone() {
            return Err(self.gone());
        }
        let eventfd = eventfd.map(|fd| fd.try_clone_to_owned()).transpose();
        let eventfd = eventfd.map_err(|source| PciError::Io {
            device: self.link.name.clone(),
            what: "an eventfd cannot be kept".to_owned(),
            source,
        })?;
        match self.link.bind(vector, eventfd) {
            true => Ok(()),
            false => Err(self.refused(format!("there is no vector {vector}"))),
        }
    }

    fn unmask(&self, _vector: u16) -> Result<(), PciError> {
        if self.link.is_gone() {
            return Err(self.gone());
        }
        self.link.unmask_level();
        Ok(())
    }

    fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.news_fd())
    }

    fn news(&self) -> Option<DeviceNews> {
        self.link.next_news()
    }

    fn close(&self) {
        self.link.gone.store(true, Ordering::Release);
        self.link.call(Machine::stop);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
        self.link.unbind_all();
        self.domain.clear();
    }
}

impl Drop for ModelBacking {
    fn drop(&mut self) {
        self.close();
    }
}
