//! What a device's status means for the request.
//!
//! **Invariant:** an error of the medium is never tried again here, the device has done that; what may pass by itself is, a
//! bounded number of times, unless the device says that it is useless.

use ringmill_core::IoStatus;
use ringmill_core::spec::nvme::{STATUS_TYPE_PATH, Status, status};

const STATUS_TYPE_MASK: u16 = 0x700;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// For good.
    Ended(IoStatus),
    /// It may succeed when it is sent again; when it may not be, it ends like this.
    Again(IoStatus),
}

/// Judges the status of an I/O command.
#[cold]
pub(super) fn verdict(answer: Status) -> Verdict {
    let verdict = match answer.kind() {
        0 => Verdict::Ended(IoStatus::Ok),
        status::INVALID_OPCODE => Verdict::Ended(IoStatus::Unsupported),
        // A command of ours that the device finds wrong is as wrong the next time.
        status::INVALID_FIELD
        | status::INVALID_SGL_SEGMENT
        | status::INVALID_SGL_COUNT
        | status::INVALID_SGL_LENGTH
        | status::INVALID_SGL_TYPE
        | status::INVALID_PRP_OFFSET
        | status::CONFLICTING_ATTRIBUTES => Verdict::Ended(IoStatus::Invalid),
        // CIDs of ours are unique: the device's memory of an earlier command is at fault, and the next CID is another one.
        status::CID_CONFLICT | status::INTERNAL_ERROR => Verdict::Again(IoStatus::Medium),
        // An error on the bus, or memory that the IOMMU does not show: the first passes.
        status::DATA_TRANSFER_ERROR => Verdict::Again(IoStatus::Memory),
        // We asked for it, because it took too long.
        status::ABORTED => Verdict::Again(IoStatus::Timeout),
        status::ABORTED_SQ_DELETED | status::ABORTED_POWER_LOSS => Verdict::Again(IoStatus::Reset),
        status::NAMESPACE_NOT_READY
        | status::FORMAT_IN_PROGRESS
        | status::COMMAND_INTERRUPTED
        | status::TRANSIENT_TRANSPORT_ERROR => Verdict::Again(IoStatus::Medium),
        // Detached, or formatted into something else.
        status::INVALID_NAMESPACE => Verdict::Ended(IoStatus::Gone),
        status::WRITE_PROTECTED | status::WRITE_TO_READ_ONLY => Verdict::Ended(IoStatus::ReadOnly),
        status::LBA_OUT_OF_RANGE => Verdict::Ended(IoStatus::Range),
        status::CAPACITY_EXCEEDED => Verdict::Ended(IoStatus::NoSpace),
        kind if kind & STATUS_TYPE_MASK == STATUS_TYPE_PATH => Verdict::Again(IoStatus::Medium),
        // Errors of the medium, reservations, locked or sanitized devices, vendors' codes.
        _ => Verdict::Ended(IoStatus::Medium),
    };
    match verdict {
        Verdict::Again(status) if answer.do_not_retry() => Verdict::Ended(status),
        verdict => verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_success_is_success_and_no_flag_makes_an_error_pass() {
        for bits in 0..1u16 << 15 {
            let answer = Status(bits);
            let verdict = verdict(answer);
            assert_eq!(verdict == Verdict::Ended(IoStatus::Ok), bits & 0x7ff == 0, "{answer:?}");
            assert!(!matches!(verdict, Verdict::Again(IoStatus::Ok)));
            if answer.do_not_retry() {
                assert!(matches!(verdict, Verdict::Ended(_)), "{answer:?}");
            }
        }
    }

    #[test]
    fn the_medium_is_believed_and_what_passes_is_tried_again() {
        for code in 0x80..=0x87 {
            let verdict = verdict(Status::new(2, code));
            assert_eq!(verdict, Verdict::Ended(IoStatus::Medium), "{code:#x}");
        }
        let judge = |kind| verdict(Status(kind));
        assert_eq!(judge(status::ABORTED), Verdict::Again(IoStatus::Timeout));
        assert_eq!(judge(status::NAMESPACE_NOT_READY), Verdict::Again(IoStatus::Medium));
        assert_eq!(judge(status::INVALID_NAMESPACE), Verdict::Ended(IoStatus::Gone));
        assert_eq!(judge(status::CAPACITY_EXCEEDED), Verdict::Ended(IoStatus::NoSpace));
        assert_eq!(judge(status::WRITE_PROTECTED), Verdict::Ended(IoStatus::ReadOnly));
        assert_eq!(judge(0x303), Verdict::Again(IoStatus::Medium), "access in transition");
    }
}
