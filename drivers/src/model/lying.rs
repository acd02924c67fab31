//! A PCI device that lies, for fuzzing the driver.
//!
//! It is the model with a source of lies: registers, identify data, log pages and completions are sometimes changed,
//! dropped, doubled or made up. It never touches memory that is not mapped for it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ringmill_core::mem::DmaDomain;

use super::backing::{ModelBacking, start_with_lies};
use super::control::ModelControl;
use super::link::ModelRegisters;
use super::options::{ModelNamespace, ModelOptions};
use crate::pci::{DeviceNews, PciBacking, PciError};

/// The device.
#[derive(Debug)]
pub struct LyingBacking(ModelBacking);

impl LyingBacking {
    /// A controller whose lies follow from `bytes`: a fuzzer's input, or a seed. The same bytes lie the same way as long as
    /// the driver asks the same.
    ///
    /// # Errors
    /// As for [`start`](super::start).
    pub fn start(
        bytes: &[u8],
        options: ModelOptions,
        namespaces: Vec<ModelNamespace>,
    ) -> Result<(LyingBacking, ModelControl), Box<dyn std::error::Error>> {
        let (backing, control) = start_with_lies(options, namespaces, Some(bytes))?;
        Ok((LyingBacking(backing), control))
    }
}

impl PciBacking for LyingBacking {
    type Registers = ModelRegisters;

    fn name(&self) -> &str {
        self.0.name()
    }

    fn dma(&self) -> Arc<dyn DmaDomain> {
        self.0.dma()
    }

    fn registers(&self, bar: u8, len_bytes_min: usize) -> Result<Arc<ModelRegisters>, PciError> {
        self.0.registers(bar, len_bytes_min)
    }

    fn config_read(&self, offset_bytes: u64, into: &mut [u8]) -> Result<(), PciError> {
        self.0.config_read(offset_bytes, into)?;
        self.0.lie_about(into);
        Ok(())
    }

    fn set_bus_master(&self, on: bool) -> Result<(), PciError> {
        self.0.set_bus_master(on)
    }

    fn reset(&self) -> Result<(), PciError> {
        self.0.reset()
    }

    fn vectors_count(&self) -> u16 {
        self.0.vectors_count()
    }

    fn bind_vector(&self, vector: u16, eventfd: Option<BorrowedFd<'_>>) -> Result<(), PciError> {
        self.0.bind_vector(vector, eventfd)
    }

    fn unmask(&self, vector: u16) -> Result<(), PciError> {
        self.0.unmask(vector)
    }

    fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.news_fd()
    }

    fn news(&self) -> Option<DeviceNews> {
        self.0.news()
    }

    fn close(&self) {
        self.0.close();
    }
}
