//! What the controller says of itself (Base 2.0 §5.17.2.1, NVM Command Set 1.0 §4.1.5.4).

use ringmill_core::spec::nvme::{IDENTIFY_BYTES, cap, event, id_ctrl, id_ctrl_nvm};

use super::namespace::{put, put_text};
use super::options::{ModelOptions, Sgls};

/// CNS 1.
pub(super) fn controller(o: &ModelOptions, capabilities: u64) -> [u8; IDENTIFY_BYTES] {
    let mut data = [0; IDENTIFY_BYTES];
    put(&mut data, id_ctrl::VID, &o.pci_id.0.to_le_bytes());
    put(&mut data, id_ctrl::VID + 2, &o.pci_id.0.to_le_bytes());
    put_text(&mut data, id_ctrl::SN, 20, &o.serial);
    put_text(&mut data, id_ctrl::MN, 40, &o.model);
    put_text(&mut data, id_ctrl::FR, 8, &o.firmware);
    data[id_ctrl::MDTS] = o.mdts;
    put(&mut data, id_ctrl::CNTLID, &1u16.to_le_bytes());
    put(&mut data, id_ctrl::VER, &0x0002_0000u32.to_le_bytes());
    put(&mut data, id_ctrl::OAES, &event::ENABLE_NAMESPACE.to_le_bytes());
    let oacs = if o.doorbell_buffer { id_ctrl::OACS_DOORBELL_BUFFER } else { 0 };
    put(&mut data, id_ctrl::OACS, &oacs.to_le_bytes());
    data[id_ctrl::ACL_Z] = o.aborts_max.max(1) - 1;
    data[id_ctrl::AERL_Z] = o.events_max.max(1) - 1;
    // Log pages have offsets and long lengths.
    data[id_ctrl::LPA] = 4;
    data[id_ctrl::ELPE_Z] = 63;
    put(&mut data, id_ctrl::WCTEMP, &343u16.to_le_bytes());
    data[id_ctrl::SQES] = 0x66;
    data[id_ctrl::CQES] = 0x44;
    let entries = (capabilities & cap::MQES_Z_MASK) as u16;
    put(&mut data, id_ctrl::MAXCMD, &entries.to_le_bytes());
    put(&mut data, id_ctrl::NN, &o.namespaces_max.to_le_bytes());
    let mut oncs = 0;
    if o.dsm {
        oncs |= id_ctrl::ONCS_DSM;
    }
    if o.write_zeroes {
        oncs |= id_ctrl::ONCS_WRITE_ZEROES;
    }
    put(&mut data, id_ctrl::ONCS, &oncs.to_le_bytes());
    // Flush takes the broadcast id.
    data[id_ctrl::VWC] = if o.write_cache { id_ctrl::VWC_PRESENT | 3 << 1 } else { 0 };
    let sgls: u32 = match o.sgls {
        Sgls::None => 0,
        Sgls::Bytes => 1,
        Sgls::Dwords => 2,
    };
    let bucket = u32::from(o.bit_bucket && sgls > 0) << 16;
    put(&mut data, id_ctrl::SGLS, &(sgls | bucket).to_le_bytes());
    data
}

/// CNS 2: ids above `after`, in order.
pub(super) fn active(ids: impl Iterator<Item = u32>, after: u32) -> [u8; IDENTIFY_BYTES] {
    let mut data = [0; IDENTIFY_BYTES];
    let mut ids: Vec<u32> = ids.filter(|id| *id > after).collect();
    ids.sort_unstable();
    for (place, id) in data.as_chunks_mut::<4>().0.iter_mut().zip(ids) {
        *place = id.to_le_bytes();
    }
    data
}

/// CNS 6 for the NVM command set.
pub(super) fn controller_of_nvm(o: &ModelOptions) -> [u8; IDENTIFY_BYTES] {
    let mut data = [0; IDENTIFY_BYTES];
    data[id_ctrl_nvm::WZSL] = o.write_zeroes_max;
    data[id_ctrl_nvm::DMRL] = o.dsm_ranges_max;
    put(&mut data, id_ctrl_nvm::DMRSL, &o.dsm_range_blocks_max.to_le_bytes());
    data
}
