//! Namespaces that come, go and change their size while guests use them.

use std::io::Read;

use ringmill_drivers::model::{Medium, ModelNamespace, ModelOptions};
use serde_json::json;
use tempfile::TempDir;

use super::daemon::{WAIT_MAX, wait_for};
use super::frontend::{
    DATA_BYTES, P_BACKEND_REQ, P_CONFIG, P_MEM_SLOTS, P_MQ, P_REPLY_ACK, running,
};
use super::model::Op;
use super::{DISK_BYTES, Device, end, exercise, fails_soon, has_bdev, serving, serving_on};

#[test]
fn namespaces_come_go_and_shrink_under_guests() {
    let device = Device::new();
    let (daemon, mut exercise) = serving(&device, &json!({}));
    exercise.one(Op::Write, 0, 8);

    let medium = Medium::ram(DISK_BYTES).expect("memory");
    device.control.attach_namespace(ModelNamespace::new(2, 12, DISK_BYTES >> 12, medium));
    assert!(wait_for(WAIT_MAX, || has_bdev(&daemon, "Nvme0n2")), "no bdev for a new namespace");
    let second = daemon.add_controller("w", "Nvme0n2", &json!({}));
    let mut other = self::exercise(&second, 2);
    other.one(Op::Write, 0, 8);
    other.one(Op::Read, 0, 8);

    device.control.resize_namespace(1, DISK_BYTES / 512 / 2);
    let blocks =
        || daemon.call("bdev_get_bdevs", &json!({"name": "Nvme0n1"}))[0]["num_blocks"].as_u64();
    assert!(wait_for(WAIT_MAX, || blocks() == Some(DISK_BYTES / 512 / 2)), "{:?}", blocks());
    let told = || exercise.client.capacity_now().expect("a config");
    assert!(wait_for(WAIT_MAX, || told() == DISK_BYTES / 2), "the guest is told {}", told());
    assert!(!exercise.succeeds(Op::Read, DISK_BYTES / 512 - 1, 1), "beyond the end");
    exercise.one(Op::Read, 0, 8);

    device.control.detach_namespace(2);
    assert!(wait_for(WAIT_MAX, || !has_bdev(&daemon, "Nvme0n2")), "it stays");
    assert!(fails_soon(&mut other));
    exercise.one(Op::Read, 0, 8);
    let saved = daemon.call("framework_get_config", &json!({"name": "vhost_blk"}));
    assert_eq!(saved.as_array().expect("calls").len(), 1, "{saved}");
    end(&device, daemon);
}

#[test]
fn a_guest_hears_of_each_new_size_and_uses_what_is_there() {
    const SLOTS: u16 = 8;
    const DATA_GUEST: u64 = 1 << 30;
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 and no need_reply, no payload.
    const CHANGED: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    let medium = Medium::ram(2 * DISK_BYTES).expect("memory");
    let dir = TempDir::new().expect("a directory");
    let device = Device::over(dir, ModelOptions::default(), &[9], vec![medium]);
    let (daemon, socket) = serving_on("3", &device, &json!({}));
    let all = P_MQ | P_REPLY_ACK | P_CONFIG | P_MEM_SLOTS | P_BACKEND_REQ;
    let (mut front, mut load, data) = running(&socket, all, SLOTS, DATA_GUEST);
    let mut news = front.backend_channel();
    let mut sectors = DISK_BYTES / 512;
    let block_sectors = DATA_BYTES / 512;
    for (round, eighths) in (1u64..).zip([9, 12, 4, 16]) {
        load.run(&data, 50);
        let old = std::mem::replace(&mut sectors, DISK_BYTES / 512 * eighths / 8);
        device.control.resize_namespace(1, sectors);
        let mut header = [0; 12];
        news.read_exact(&mut header).expect("an announcement");
        assert_eq!(header, CHANGED);
        assert_eq!(front.capacity_sectors(), sectors);
        // Its load goes on in what was there before and still is.
        load.run(&data, 50);
        load.drain(&[&data]);
        // The last block, one across the old end, and nothing beyond the new one.
        for at in [sectors - block_sectors, old.min(sectors) - block_sectors / 2] {
            let is_inside = at + block_sectors <= sectors;
            let wanted = [0xa0 | u8::try_from(round).unwrap(); 4096];
            data.write(0, &wanted);
            let status = load.ring.one(&load.memory, true, at, DATA_GUEST);
            assert_eq!(status == 0, is_inside, "a write at {at} of {sectors}: {status}");
            data.write(0, &[0; 4096]);
            let status = load.ring.one(&load.memory, false, at, DATA_GUEST);
            assert_eq!(status == 0, is_inside, "a read at {at} of {sectors}: {status}");
            if is_inside {
                assert_eq!(data.read::<4096>(0), wanted, "at {at} of {sectors}");
                let mut stored = [0; 4096];
                device.media[0].peek(at * 512, &mut stored);
                assert_eq!(stored, wanted, "on the medium, at {at} of {sectors}");
            }
        }
        assert_ne!(load.ring.one(&load.memory, true, sectors, DATA_GUEST), 0, "beyond the end");
    }
    end(&device, daemon);
}
