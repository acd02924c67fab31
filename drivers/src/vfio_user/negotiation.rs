//! The first message: versions and capabilities.
//!
//! Flow: our proposal as JSON → the server's answer, checked, → [`Limits`] that every later message respects.
//!
//! Spec: vfio-user 0.9, `VFIO_USER_VERSION`.

use ringmill_core::limits::VFIO_USER_FDS_MAX;
use serde_json::{Value, json};

use super::protocol::{Fields, VERSION_MAJOR, VERSION_MINOR, command};

/// What a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Descriptors per message.
    pub(super) msg_fds_max: u64,
    /// Data of one region access.
    pub(super) transfer_bytes_max: u64,
    /// Mappings at the same time.
    pub(super) dma_maps_max: u64,
    /// The smallest pages that it maps.
    pub(super) page_bytes: u64,
}

impl Limits {
    /// Data of one access by the server that we serve: the protocol's own default.
    pub(super) const OURS_TRANSFER_BYTES: u64 = 1 << 20;

    /// What the specification says of a server that says nothing.
    const DEFAULT: Limits = Limits {
        msg_fds_max: 1,
        transfer_bytes_max: 1 << 20,
        dma_maps_max: 65_535,
        page_bytes: 4096,
    };
}

/// The proposal's payload.
pub(super) fn proposal() -> Vec<u8> {
    let data = json!({"capabilities": {
        "max_msg_fds": VFIO_USER_FDS_MAX,
        "max_data_xfer_size": Limits::OURS_TRANSFER_BYTES,
        "max_dma_maps": Limits::DEFAULT.dma_maps_max,
        "pgsizes": 4096,
    }});
    let mut payload = Vec::new();
    payload.extend_from_slice(&VERSION_MAJOR.to_le_bytes());
    payload.extend_from_slice(&VERSION_MINOR.to_le_bytes());
    payload.extend_from_slice(data.to_string().as_bytes());
    payload.push(0);
    payload
}

/// Reads the answer.
///
/// # Errors
/// In words, what makes the server unusable.
pub(super) fn answer(payload: &[u8]) -> Result<Limits, String> {
    let fields = Fields::new(command::VERSION, payload);
    let words = |error: super::protocol::ProtocolError| format!("it sent {error}");
    let (major, minor) = (fields.u16(0).map_err(words)?, fields.u16(2).map_err(words)?);
    if major != VERSION_MAJOR || minor > VERSION_MINOR {
        return Err(format!(
            "it speaks vfio-user {major}.{minor}, and ringmill {VERSION_MAJOR}.{VERSION_MINOR}"
        ));
    }
    let data = fields.rest(4).map_err(words)?;
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    if end == 0 {
        return Ok(Limits::DEFAULT);
    }
    let value: Value = serde_json::from_slice(&data[..end])
        .map_err(|error| format!("its capabilities are not JSON: {error}"))?;
    let empty = Value::Null;
    let capabilities = value.get("capabilities").unwrap_or(&empty);
    let number = |name: &str, default: u64| match capabilities.get(name) {
        None => Ok(default),
        Some(value) => {
            value.as_u64().ok_or_else(|| format!("its capability {name} is {value}, not a number"))
        }
    };
    let default = Limits::DEFAULT;
    let page_sizes = number("pgsizes", default.page_bytes)?;
    let limits = Limits {
        msg_fds_max: number("max_msg_fds", default.msg_fds_max)?,
        transfer_bytes_max: number("max_data_xfer_size", default.transfer_bytes_max)?,
        dma_maps_max: number("max_dma_maps", default.dma_maps_max)?,
        // The lowest bit; smaller pages than ours never matter.
        page_bytes: (page_sizes & page_sizes.wrapping_neg()).max(4096),
    };
    if limits.msg_fds_max == 0 {
        return Err(
            "it takes no file descriptors (max_msg_fds is 0), so memory cannot be shared".into()
        );
    }
    if limits.transfer_bytes_max < 8 || limits.dma_maps_max == 0 || page_sizes == 0 {
        return Err(format!("its limits leave nothing: {capabilities}"));
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload(major: u16, minor: u16, data: &str) -> Vec<u8> {
        let mut bytes = major.to_le_bytes().to_vec();
        bytes.extend(minor.to_le_bytes());
        bytes.extend(data.as_bytes());
        bytes.push(0);
        bytes
    }

    #[test]
    fn a_proposal_is_an_answer_that_we_would_take() {
        let ours = answer(&proposal()).unwrap();
        assert_eq!(ours.msg_fds_max, VFIO_USER_FDS_MAX as u64);
        assert_eq!(ours.transfer_bytes_max, Limits::OURS_TRANSFER_BYTES);
    }

    #[test]
    fn silence_means_the_defaults_of_the_specification() {
        for data in ["", "{}", r#"{"capabilities":{}}"#, r#"{"capabilities":null}"#, "[]"] {
            assert_eq!(answer(&payload(0, 0, data)), Ok(Limits::DEFAULT), "{data}");
        }
        assert_eq!(answer(&[0, 0, 1, 0]), Ok(Limits::DEFAULT));
    }

    #[test]
    fn other_versions_garbage_and_limits_of_nothing_are_refused_in_words() {
        let said = |bytes: &[u8]| answer(bytes).unwrap_err();
        assert!(said(&payload(1, 0, "")).contains("speaks vfio-user 1.0"));
        assert!(said(&payload(0, 2, "")).contains("speaks vfio-user 0.2"));
        assert!(said(&[0, 0, 1]).contains("too short"));
        assert!(said(&payload(0, 1, "{\"capabilities\":")).contains("not JSON"));
        assert!(said(&payload(0, 1, &"[".repeat(100_000))).contains("not JSON"));
        let refuse =
            |data: &str| said(&payload(0, 1, &format!(r#"{{"capabilities":{{{data}}}}}"#)));
        assert!(refuse(r#""max_msg_fds":0"#).contains("max_msg_fds is 0"));
        assert!(refuse(r#""max_msg_fds":-1"#).contains("not a number"));
        assert!(refuse(r#""max_dma_maps":"many""#).contains("not a number"));
        assert!(refuse(r#""max_data_xfer_size":4"#).contains("leave nothing"));
        assert!(refuse(r#""pgsizes":0"#).contains("leave nothing"));
    }

    #[test]
    fn the_smallest_page_counts() {
        let pages = |data: u64| {
            let data = format!(r#"{{"capabilities":{{"pgsizes":{data}}}}}"#);
            answer(&payload(0, 1, &data)).unwrap().page_bytes
        };
        assert_eq!(pages(4096), 4096);
        assert_eq!(pages(1 << 21 | 1 << 30), 1 << 21);
        assert_eq!(pages(512 | 4096), 4096);
    }

    proptest! {
        #[test]
        fn garbage_is_limits_or_words(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(limits) = answer(&bytes) {
                prop_assert!(limits.msg_fds_max > 0 && limits.page_bytes.is_power_of_two());
            }
        }
    }
}
