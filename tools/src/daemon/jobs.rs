//! Work that may block, such as opening an image on a slow file system: a thread each, the result back by message.
//!
//! **Invariant:** the control thread never waits for a job; a result is applied by the control thread only.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;

use rustix::event::{EventfdFlags, eventfd};

/// What a job leaves for the control thread to do with `T`.
pub type Applied<T> = Box<dyn FnOnce(&mut T) + Send>;

/// The jobs of one owner.
pub struct Jobs<T> {
    sender: mpsc::Sender<Applied<T>>,
    receiver: mpsc::Receiver<Applied<T>>,
    wake: Arc<OwnedFd>,
}

/// Sends work to the owner from threads that are no jobs.
pub struct Poster<T> {
    sender: mpsc::Sender<Applied<T>>,
    wake: Arc<OwnedFd>,
}

impl<T> Poster<T> {
    /// Has the owner apply this. Does not block.
    pub fn post(&self, applied: Applied<T>) {
        // The owner is gone only when the daemon ends.
        let _ = self.sender.send(applied);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl<T> AsFd for Jobs<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl<T: 'static> Jobs<T> {
    /// No jobs yet.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new() -> io::Result<Jobs<T>> {
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Jobs { sender, receiver, wake })
    }

    /// Runs `job` on a thread of its own; what it returns is applied later.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        &self,
        name: &str,
        job: impl FnOnce() -> Applied<T> + Send + 'static,
    ) -> io::Result<()> {
        let poster = self.poster();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || poster.post(job()))?;
        Ok(())
    }

    /// For threads that have something to say on their own account.
    pub fn poster(&self) -> Poster<T> {
        Poster { sender: self.sender.clone(), wake: Arc::clone(&self.wake) }
    }

    /// The next result; call until `None` when the descriptor is readable.
    pub fn next(&self) -> Option<Applied<T>> {
        if let Ok(applied) = self.receiver.try_recv() {
            return Some(applied);
        }
        let mut count = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        self.receiver.try_recv().ok()
    }
}
