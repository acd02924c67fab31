//! Channels that share a pair.

use ringmill_core::bdev::Channel;

use super::rig::{Options, Rig};

#[test]
fn completions_find_their_channel_whoever_looks() {
    let mut rig = Rig::new(&Options { channels: 3, ..Options::default() });
    for round in 0..500u32 {
        for channel in 0..3u32 {
            assert!(rig.read(channel as usize, round * 10 + channel));
        }
        rig.commit();
        rig.device.serve();
        for turn in 0..3 {
            let channel = (round + turn) % 3;
            assert_eq!(rig.tags(channel as usize), [round * 10 + channel]);
        }
    }
    assert!(rig.pair().is_idle());
}

#[test]
fn one_poll_hands_back_what_fits_and_the_next_one_the_rest() {
    let mut rig = Rig::new(&Options { entries: 256, channels: 2, ..Options::default() });
    let taken = (0..255).filter(|tag| rig.read(0, *tag)).count();
    rig.commit();
    rig.device.serve();
    assert!(rig.poll(1).is_empty());
    let mut tags = Vec::new();
    while tags.len() < taken {
        let more = rig.tags(0);
        assert!(!more.is_empty() && more.len() <= 64);
        tags.extend(more);
    }
    assert_eq!(tags, (0..u32::try_from(taken).unwrap()).collect::<Vec<_>>());
}

#[test]
fn a_greedy_channel_leaves_the_others_their_minimum() {
    for (entries, channels, minimum) in [(256, 2, 16), (64, 4, 7), (17, 4, 2)] {
        let mut rig = Rig::new(&Options { entries, channels, ..Options::default() });
        let mut taken = 0;
        while rig.read(0, taken) {
            taken += 1;
        }
        let all = u32::from(entries) - 1;
        let kept = minimum * (u32::try_from(channels).unwrap() - 1);
        assert_eq!(taken, all - kept, "{entries} entries for {channels}");
        for channel in 1..channels {
            let got = (0..100).filter(|tag| rig.read(channel, *tag)).count();
            assert_eq!(got, minimum as usize, "{entries} entries for {channels}");
        }
        // Who leaves leaves its share.
        rig.commit();
        rig.device.serve();
        let mut ended = 0;
        while ended < all as usize {
            ended += (0..channels).map(|channel| rig.poll(channel).len()).sum::<usize>();
        }
        while rig.channels.len() > 1 {
            let mut channel = rig.channels.pop().unwrap();
            channel.close(&mut rig.cx.io);
        }
        let mut taken = 0;
        while rig.read(0, taken) {
            taken += 1;
        }
        assert_eq!(taken, all);
    }
}

#[test]
fn with_fewer_slots_than_channels_everybody_gets_a_turn() {
    for entries in [2, 3, 5] {
        let channels = 6;
        let mut rig = Rig::new(&Options { entries, channels, ..Options::default() });
        let mut served = vec![0u32; channels];
        for _ in 0..3000 {
            // As a worker does: it offers only when there is room.
            for channel in 0..channels {
                while rig.channels[channel].room(&rig.cx.io).requests > 0 {
                    assert!(rig.read(channel, 0));
                }
            }
            rig.commit();
            rig.device.serve();
            for (channel, count) in served.iter_mut().enumerate() {
                *count += u32::try_from(rig.poll(channel).len()).unwrap();
            }
        }
        let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
        assert!(*least > 0 && most / least <= 12, "{entries} entries: {served:?}");
    }
}

#[test]
fn an_idle_channel_costs_a_busy_one_no_turn_for_long() {
    let mut rig = Rig::new(&Options { entries: 2, channels: 2, ..Options::default() });
    assert!(rig.read(0, 0));
    // It wanted something once and never comes back.
    assert_eq!(rig.channels[1].room(&rig.cx.io).requests, 0);
    let mut served = 0;
    for _ in 0..100 {
        rig.commit();
        rig.device.serve();
        served += rig.poll(0).len();
        if rig.channels[0].room(&rig.cx.io).requests > 0 {
            assert!(rig.read(0, 0));
        }
    }
    assert!(served > 90, "{served}");
}
