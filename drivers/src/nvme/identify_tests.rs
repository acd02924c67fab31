//! Pages as sound, odd and hostile devices write them.

use proptest::prelude::*;
use ringmill_core::bdev::Geometry;

use super::*;

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

fn controller_page() -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, id_ctrl::VID, &0x1b36u16.to_le_bytes());
    put(&mut page, id_ctrl::SN, b"  serial-7\0\x7f\x01       ");
    put(&mut page, id_ctrl::MN, b"A model of ours                         ");
    put(&mut page, id_ctrl::FR, b"1.0     ");
    put(&mut page, id_ctrl::CNTLID, &9u16.to_le_bytes());
    put(&mut page, id_ctrl::MDTS, &[7]);
    put(&mut page, id_ctrl::AERL_Z, &[3]);
    put(&mut page, id_ctrl::OACS, &0x100u16.to_le_bytes());
    put(&mut page, id_ctrl::SQES, &[0x66]);
    put(&mut page, id_ctrl::CQES, &[0x44]);
    put(&mut page, id_ctrl::ONCS, &0x0cu16.to_le_bytes());
    put(&mut page, id_ctrl::VWC, &[7]);
    put(&mut page, id_ctrl::SGLS, &1u32.to_le_bytes());
    page
}

fn namespace_page(blocks: u64, shift: u8) -> Vec<u8> {
    let mut page = vec![0; 4096];
    put(&mut page, id_ns::NSZE, &blocks.to_le_bytes());
    put(&mut page, id_ns::LBAF, &[0, 0, shift, 0]);
    page
}

#[test]
fn a_controller_is_read_as_it_is_written() {
    let data = ControllerData::parse(&controller_page(), Quirks::NONE);
    assert_eq!((data.serial.as_str(), data.model.as_str()), ("serial-7", "A model of ours"));
    assert_eq!((data.vendor, data.cntlid, data.event_requests_max), (0x1b36, 9, 4));
    assert_eq!(data.transfer_bytes_max, Some(512 << 10));
    assert_eq!(data.command_bytes_max(), 512 << 10);
    assert!(data.doorbell_buffer && data.discard && data.write_zeroes && data.sgl);
    assert!(data.write_cache);
    assert_eq!(data.refusal(), None);
    let quirky = Quirks::of(0x15b7, 0x2001);
    assert!(!ControllerData::parse(&controller_page(), quirky).write_zeroes);
    let quirky = Quirks::of(0x19e5, 1);
    assert!(!ControllerData::parse(&controller_page(), quirky).sgl);
}

#[test]
fn transfer_limits_beyond_reason_are_none() {
    for (mdts, bytes) in
        [(0, None), (1, Some(8192)), (24, Some(4096 << 24)), (25, None), (255, None)]
    {
        let mut page = controller_page();
        put(&mut page, id_ctrl::MDTS, &[mdts]);
        let data = ControllerData::parse(&page, Quirks::NONE);
        assert_eq!(data.transfer_bytes_max, bytes, "MDTS {mdts}");
        let whole_pages = data.command_bytes_max();
        assert!(
            whole_pages >= 4096
                && whole_pages.is_multiple_of(4096)
                && whole_pages <= TRANSFER_BYTES_MAX
        );
    }
}

#[test]
fn a_controller_without_our_entries_or_without_io_is_refused() {
    for (at, byte, word) in [
        (id_ctrl::SQES, 0x77, "64 and 16"),
        (id_ctrl::SQES, 0x55, "64 and 16"),
        (id_ctrl::CQES, 0x55, "64 and 16"),
        (id_ctrl::CNTRLTYPE, 2, "no I/O controller"),
        (id_ctrl::CNTRLTYPE, 3, "no I/O controller"),
    ] {
        let mut page = controller_page();
        page[at] = byte;
        let words = ControllerData::parse(&page, Quirks::NONE).refusal().unwrap();
        assert!(words.contains(word), "{words}");
    }
}

#[test]
fn only_whole_blocks_of_512_and_4096_bytes_are_disks() {
    let refusal = |page: &[u8]| NamespaceData::parse(page).refusal().unwrap_or_default();
    assert_eq!(refusal(&namespace_page(8, 9)), "");
    assert_eq!(refusal(&namespace_page(8, 12)), "");
    for shift in [0, 8, 10, 13, 31, 32, 255] {
        assert!(refusal(&namespace_page(8, shift)).contains("512 or 4096"), "2^{shift}");
    }
    assert!(refusal(&namespace_page(0, 9)).contains("no blocks"));
    assert_eq!(refusal(&namespace_page((1 << 54) - 1, 9)), "");
    assert!(refusal(&namespace_page(1 << 54, 9)).contains("2^63"));
    assert!(refusal(&namespace_page(u64::MAX, 12)).contains("2^63"));
    let mut metadata = namespace_page(8, 9);
    put(&mut metadata, id_ns::LBAF, &[8, 0, 9, 0]);
    assert!(refusal(&metadata).contains("8 bytes of metadata"));
    let mut protected = namespace_page(8, 9);
    protected[id_ns::DPS] = 0x0b;
    assert!(refusal(&protected).contains("type 3"));
    let mut nowhere = namespace_page(8, 9);
    nowhere[id_ns::FLBAS] = 3;
    assert!(refusal(&nowhere).contains("format that it does not have"));
    // Format 17, whose number needs the upper bits.
    let mut many = namespace_page(8, 9);
    many[id_ns::NLBAF_Z] = 17;
    many[id_ns::FLBAS] = 0x21;
    put(&mut many, id_ns::LBAF + 4 * 17, &[0, 0, 12, 0]);
    assert_eq!((refusal(&many).as_str(), NamespaceData::parse(&many).block_bytes), ("", 4096));
    many[id_ns::NLBAF_Z] = 10;
    many[id_ns::NULBAF] = 7;
    assert_eq!(refusal(&many), "", "17 is one of those with unique attributes");
    many[id_ns::NULBAF] = 6;
    assert!(refusal(&many).contains("format that it does not have"));
    many[id_ns::NULBAF] = 0;
    many[id_ns::NLBAF_Z] = 15;
    assert_eq!(NamespaceData::parse(&many).block_bytes, 1, "the upper bits are reserved here");
}

#[test]
fn hints_count_only_where_they_are_said_to() {
    let controller = ControllerData::parse(&controller_page(), Quirks::NONE);
    let mut page = namespace_page(1 << 20, 12);
    put(&mut page, id_ns::NPWG_Z, &3u16.to_le_bytes());
    put(&mut page, id_ns::NPDG_Z, &255u16.to_le_bytes());
    put(&mut page, id_ns::NOWS_Z, &31u16.to_le_bytes());
    put(&mut page, id_ns::NOIOB, &32u16.to_le_bytes());
    let data = NamespaceData::parse(&page);
    assert_eq!(data.physical_block_bytes(), 4096);
    assert_eq!(data.discard_granularity_bytes(), 4096);
    assert_eq!(data.boundary_bytes(&controller), 128 << 10);
    assert_eq!(data.optimal_io_bytes(&controller), 128 << 10);
    page[id_ns::NSFEAT] = 1 << 4;
    let data = NamespaceData::parse(&page);
    assert_eq!(data.physical_block_bytes(), 16 << 10);
    assert_eq!(data.discard_granularity_bytes(), 1 << 20);
    assert_eq!(data.optimal_io_bytes(&controller), 128 << 10);
    put(&mut page, id_ns::NPWG_Z, &2u16.to_le_bytes());
    assert_eq!(NamespaceData::parse(&page).physical_block_bytes(), 4096, "not a power of two");
    assert!(!data.deallocate_zeroes);
    for (dlfeat, zeroes) in [(0x09, true), (0x01, false), (0x08, false), (0x0a, false)] {
        page[id_ns::DLFEAT] = dlfeat;
        assert_eq!(NamespaceData::parse(&page).deallocate_zeroes, zeroes, "{dlfeat:#x}");
    }
}

#[test]
fn a_stripe_is_a_boundary_only_for_those_that_have_it() {
    let mut page = controller_page();
    page[id_ctrl::VS + 3] = 5;
    let namespace = NamespaceData::parse(&namespace_page(8, 9));
    let plain = ControllerData::parse(&page, Quirks::NONE);
    assert_eq!(namespace.boundary_bytes(&plain), 0);
    let striped = ControllerData::parse(&page, Quirks::of(0x8086, 0x0a55));
    assert_eq!(namespace.boundary_bytes(&striped), 128 << 10);
}

#[test]
fn limits_of_ranges_and_zeroes_are_usable_whatever_they_say() {
    let controller = ControllerData::parse(&controller_page(), Quirks::NONE);
    let namespace = NamespaceData::parse(&namespace_page(1 << 30, 12));
    let unknown = SetLimits::default();
    assert_eq!(namespace.write_zeroes(&controller, unknown).blocks_max, 128, "MDTS counts");
    let mut page = vec![0; 4096];
    let free = SetLimits::parse(&page, 2);
    assert_eq!(namespace.write_zeroes(&controller, free).blocks_max, 1 << 16);
    let empty = SetLimits::parse(&page, 1);
    assert_eq!(namespace.write_zeroes(&controller, empty).blocks_max, 128, "MDTS counts");
    let discard = free.discard();
    assert_eq!(
        (discard.ranges_max, discard.range_blocks_max, discard.blocks_max),
        (256, u32::MAX, u64::MAX)
    );
    page[id_ctrl_nvm::WZSL] = 4;
    page[id_ctrl_nvm::DMRL] = 2;
    put(&mut page, id_ctrl_nvm::DMRSL, &64u32.to_le_bytes());
    put(&mut page, id_ctrl_nvm::DMSL, &100u64.to_le_bytes());
    let bound = SetLimits::parse(&page, 1);
    assert_eq!(namespace.write_zeroes(&controller, bound).blocks_max, 16);
    let discard = bound.discard();
    assert_eq!((discard.ranges_max, discard.range_blocks_max, discard.blocks_max), (2, 64, 100));
}

#[test]
fn the_identity_is_the_best_that_there_is_and_stable() {
    let mut list = vec![0; 4096];
    put(&mut list, 0, &[id_desc::EUI64, 8, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    put(&mut list, 12, &[id_desc::NGUID, 16, 0, 0]);
    list[16..32].fill(0xaa);
    put(&mut list, 32, &[99, 2, 0, 0, 1, 1]);
    put(&mut list, 38, &[id_desc::UUID, 16, 0, 0]);
    list[42..58].fill(0xbb);
    let mut identity = Identity::default();
    identity.read_descriptors(&list[..32]);
    assert_eq!(identity.uuid("s", "m", 1, false), Uuid::from_bytes([0xaa; 16]));
    identity.read_descriptors(&list);
    assert_eq!(identity.uuid("s", "m", 1, false), Uuid::from_bytes([0xbb; 16]));
    assert_eq!((identity.eui64, identity.foreign_set), (Some([1, 2, 3, 4, 5, 6, 7, 8]), None));
    let made = |identity: &Identity, serial, nsid| identity.uuid(serial, "m", nsid, true);
    assert_eq!(made(&identity, "s", 1), made(&Identity::default(), "s", 1));
    assert_ne!(made(&identity, "s", 1), made(&identity, "s", 2));
    assert_ne!(made(&identity, "s", 1), made(&identity, "t", 1));
    let only_eui64 = Identity { eui64: Some([7; 8]), ..Identity::default() };
    assert_eq!(only_eui64.uuid("s", "m", 1, false), only_eui64.uuid("t", "n", 2, false));
    let mut foreign = vec![0; 16];
    put(&mut foreign, 0, &[id_desc::COMMAND_SET, 1, 0, 0, 2]);
    let mut identity = Identity::default();
    identity.read_descriptors(&foreign);
    assert_eq!(identity.foreign_set, Some(2));
}

#[test]
fn ids_of_namespaces_rise_or_the_list_has_ended() {
    let list = |ids: &[u32]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
    assert_eq!(rising_ids(&list(&[1, 2, 7, 0, 9]), 0), [1, 2, 7]);
    assert_eq!(rising_ids(&list(&[5, 6]), 5), [0; 0]);
    assert_eq!(rising_ids(&list(&[3, 3, 4]), 0), [3]);
    assert_eq!(rising_ids(&list(&[3, u32::MAX]), 0), [3]);
    assert_eq!(rising_ids(&[1, 0], 0), [0; 0]);
}

#[test]
fn health_is_read_from_its_places() {
    let mut page = vec![0; 512];
    page[0] = 0b101;
    put(&mut page, 1, &310u16.to_le_bytes());
    put(&mut page, health::MEDIA_ERRORS, &(u128::from(u64::MAX) + 3).to_le_bytes());
    put(&mut page, health::CRITICAL_MINUTES, &77u32.to_le_bytes());
    let health = parse_health(&page);
    assert_eq!((health.critical_warning, health.temperature_kelvin), (5, 310));
    assert_eq!(health.media_errors, u128::from(u64::MAX) + 3);
    assert_eq!(health.critical_temperature_minutes, 77);
    assert_eq!(warning_words(5), ["spare blocks run out", "reliability degraded"]);
}

proptest! {
    /// What is not refused makes a geometry, and its limits can be worked with.
    #[test]
    fn no_page_is_too_odd(
        mut page in proptest::collection::vec(any::<u8>(), 4096),
        other in proptest::collection::vec(any::<u8>(), 0..4097),
        tame in any::<bool>(),
    ) {
        if tame {
            page[id_ns::NSZE + 6..id_ns::NSZE + 8].fill(0);
            page[id_ns::NLBAF_Z] = 63;
            page[id_ns::DPS] = 0;
            for format in 0..64 {
                put(&mut page, id_ns::LBAF + 4 * format, &[0, 0, if format % 2 == 0 { 9 } else { 12 }]);
            }
        }
        let namespace = NamespaceData::parse(&page);
        let controller = ControllerData::parse(&other, Quirks::of(0x8086, 0x0953));
        let limits = SetLimits::parse(&other, 2);
        let mut identity = namespace.identity;
        identity.read_descriptors(&other);
        let _ = (parse_health(&other), controller.refusal(), rising_ids(&other, 0));
        prop_assert!(controller.command_bytes_max() >= 4096);
        let discard = limits.discard();
        prop_assert!(discard.ranges_max >= 1 && discard.range_blocks_max >= 1 && discard.blocks_max >= 1);
        if namespace.refusal().is_none() {
            let geometry = Geometry {
                block_bytes: namespace.block_bytes,
                physical_block_bytes: namespace.physical_block_bytes(),
                optimal_io_bytes: namespace.optimal_io_bytes(&controller),
                blocks_count: namespace.blocks_count,
                read_only: namespace.read_only,
                write_cache: controller.write_cache,
                discard: controller.discard,
                discard_granularity_bytes: namespace.discard_granularity_bytes(),
                write_zeroes: controller.write_zeroes,
            };
            prop_assert_eq!(geometry.check(), Ok(()));
            prop_assert!(geometry.physical_block_bytes.is_multiple_of(geometry.block_bytes));
            let zeroes = namespace.write_zeroes(&controller, limits).blocks_max;
            prop_assert!((1..=1 << 16).contains(&zeroes));
        } else {
            prop_assert!(!tame || namespace.blocks_count == 0);
        }
    }
}
