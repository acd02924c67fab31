//! ringmill-vmm-glue: what a guest and its virtual machine monitor see of ringmill.
//!
//! [`vhost_user`] speaks with front-ends (control thread), [`virtq`] reads and writes the guest's rings, [`blk`] turns
//! descriptor chains into block requests (reactors).
//!
//! **Invariant:** nothing here knows a particular block driver.

pub mod blk;
pub mod sim;
pub mod vhost_user;
pub mod virtq;
